"""Where a model comes from and where a proxy goes: a local path, or hf://owner/name[@revision].

The hub is reached only through huggingface_hub, which honours HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and HF_TOKEN.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedqsn_cli.checkpoint.companions import COMPANIONS
from fedqsn_cli.errors import HubError, InputError

SCHEME = "hf://"
REFERENCE = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)

# What a checkpoint, proxy or update consists of: no pickles, no other frameworks, no code.
WANTED = ("*.safetensors", "*.json", "*.sig", *COMPANIONS)
UNWANTED = ("*/*", "consolidated*")  # subfolders, and a second copy of the weights in another layout

# Exception of huggingface_hub -> what is wrong and what to do. The first that matches counts; older versions lack some.
ADVICE: dict[str, tuple[str, str]] = {
    "GatedRepoError": ("is gated", "ask for access on its page, then set HF_TOKEN"),
    "RepositoryNotFoundError": ("no such repository, or it is private", "check the name, and set HF_TOKEN"),
    "RevisionNotFoundError": ("has no such revision", "name a branch, tag or commit that exists"),
    "IncompleteSnapshotError": ("is only partly in the local cache", "go online once to fetch the rest"),
    "LocalEntryNotFoundError": (
        "not in the local cache, and the hub cannot be reached",
        "check the connection, HF_ENDPOINT and HF_HUB_OFFLINE",
    ),
    "OfflineModeIsEnabled": ("needs the hub", "unset HF_HUB_OFFLINE"),
    "HFValidationError": ("not a valid repository name", "write hf://owner/name or hf://owner/name@revision"),
    "HfHubHTTPError": ("the hub refuses", "check HF_TOKEN and what it may do"),
    "HTTPError": ("the hub cannot be reached", "check the connection and HF_ENDPOINT"),
}


@dataclass(frozen=True, slots=True)
class Source:
    """A model reference, the local path that stands for it, and its commit if it came from a hub."""

    path: Path
    reference: str
    revision: str | None


def resolve(reference: str) -> Source:
    """Find the local path of a reference; downloads into the hub's cache what is not there yet.

    Args:
        reference: a path, or hf://owner/name with an optional @branch, @tag or @commit.

    Raises:
        InputError: the path does not exist.
        HubError: the reference is malformed, or the hub does not give the files.
    """
    if not reference.startswith(SCHEME):
        path = Path(reference)
        if not path.exists():
            raise InputError("there is no such file or directory", where=reference)
        return Source(path, reference, None)
    repository, revision = _parse(reference)
    with _hub(reference):
        from huggingface_hub import snapshot_download

        folder = snapshot_download(
            repository, revision=revision, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)
        )
    return Source(Path(folder), reference, Path(folder).name)


def push(folder: Path, reference: str) -> str:
    """Upload a directory as one commit that replaces all files of a private repository.

    Args:
        reference: hf://owner/name, made (private) if it does not exist; @branch for another branch than main.

    Returns:
        The reference with the new commit, hf://owner/name@commit.

    Raises:
        HubError: the reference is malformed, the repository is public, or the hub refuses.
    """
    repository, revision = _parse(reference)
    with _hub(reference):
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        if api.repo_info(repository).private is not True:
            raise HubError("is public", where=reference, hint="make it private in its settings, or push to another")
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        # delete_patterns: shards of an earlier push must not stay beside the new ones
        commit = api.upload_folder(
            repo_id=repository,
            revision=revision,
            folder_path=folder,
            commit_message=f"Upload {folder.name}",
            delete_patterns="*",
        )
    return f"{SCHEME}{repository}@{commit.oid}"


def check_reference(reference: str) -> None:
    """Refuse what `push` could not push to, before there is anything to push. Raises HubError."""
    _parse(reference)


def _parse(reference: str) -> tuple[str, str | None]:
    """Split a reference into owner/name and revision."""
    match = REFERENCE.fullmatch(reference)
    if not match or ".." in reference:
        raise HubError(
            "not a model reference", where=reference, hint="write hf://owner/name or hf://owner/name@revision"
        )
    return match["repository"], match["revision"]


@contextmanager
def _hub(reference: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one clear line, and keep its bars off anything but a terminal."""
    errors: Any = importlib.import_module("huggingface_hub.errors")
    utils: Any = importlib.import_module("huggingface_hub.utils")
    quiet = not sys.stderr.isatty() and not utils.are_progress_bars_disabled()
    if quiet:
        utils.disable_progress_bars()
    try:
        yield
    except (OSError, ValueError, RuntimeError, errors.HTTPError) as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        what, hint = next((advice for name, advice in ADVICE.items() if name in kinds), (_first_line(error), None))
        response = getattr(error, "response", None)
        status = "" if response is None else f" (HTTP {response.status_code})"
        raise HubError(what + status, where=reference, hint=hint) from error
    finally:
        if quiet:
            utils.enable_progress_bars()


def _first_line(error: BaseException) -> str:
    """The beginning of a message that often goes on for a paragraph."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
