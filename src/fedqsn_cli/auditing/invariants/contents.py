"""FQ006 and FQ010: is a proxy made of the files, tensors and bytes that an export writes, and of nothing else?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from fedqsn_cli.artifacts.manifests import PROXY_MANIFEST, SIGNATURE, VISIBLE_TENSORS
from fedqsn_cli.auditing.checks import check, each_folder
from fedqsn_cli.auditing.digests import NOT_READ, digests_of
from fedqsn_cli.auditing.findings import Entry, Finding
from fedqsn_cli.auditing.inputs import KEY, LEDGER, PROXY, TRUTH, Inputs, ProxyFolder
from fedqsn_cli.auditing.invariants.secrets import (
    SECRET_IN_BYTES,
    SecretPatterns,
    find_problems,
    ordinary,
)
from fedqsn_cli.auditing.opened_proxy import OpenedProxy
from fedqsn_cli.auditing.registry import EXPORT_AGAIN, Rule
from fedqsn_cli.checkpoint.companions import is_companion
from fedqsn_cli.checkpoint.files import open_regular_file
from fedqsn_cli.export.outputs import tensor_specs
from fedqsn_cli.models.tensor_task import tensor_tasks

_MODEL_FILE = re.compile(r"model(?:-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_PIECE = 1 << 22
_TOLD_TWICE = ("job", "round", "quantization", "fill", "train", "rescale")  # in proxy.json and in the ledger


UNLISTED_CONTENT = Rule(
    "FQ010",
    "unlisted-content",
    "hard",
    what="A file or tensor that is not part of a proxy, a file that is not the one listed in proxy.json, or a proxy "
    "that the ledger does not list.",
    why="What is not in the ledger was not counted, and what is not in the format may be anything.",
    fix=EXPORT_AGAIN,
    scope="invariants",
    needs=(PROXY, TRUTH, LEDGER),
)


@check(SECRET_IN_BYTES, each_folder)
def contents(inputs: Inputs, folder: ProxyFolder) -> Iterator[Entry]:
    """Look at every byte of a folder; works, as far as it can, on proxies that cannot be opened too."""
    patterns = inputs.shared("secret patterns", lambda: SecretPatterns(inputs.job))
    digests = digests_of(inputs, folder)
    secrets = list(_secrets(folder, patterns, digests))
    texts = "metadata and texts were searched for paths, names, times and seeds"
    searched = f"every byte was searched for the key; {texts}" if inputs.job else texts
    yield from SECRET_IN_BYTES.checked(folder.scope, searched, secrets)
    if inputs.job is None:
        more = ", to search every byte for it and for its seeds"
        yield SECRET_IN_BYTES.lacks(f"{folder.scope} key", KEY, more=more)
    if folder.malformed:
        yield UNLISTED_CONTENT.finding(folder.scope, "it is not in the format of a proxy, and may hold anything")
    elif folder.opened is None:
        yield UNLISTED_CONTENT.not_run(folder.scope, "the proxy cannot be opened")
    if folder.opened is None:
        return
    found = [*_listing(folder, folder.opened, digests), *_tensors(inputs, folder.opened)]
    why = "files, digests and tensors were compared with proxy.json"
    yield from UNLISTED_CONTENT.checked(folder.scope, why, found)
    if inputs.truth is None:
        more = ", to compare names of tensors with it"
        yield UNLISTED_CONTENT.lacks(f"{folder.scope} against the truth", TRUTH, more=more)
    yield from _ledger_line(inputs, folder.opened)


def _secrets(folder: ProxyFolder, patterns: SecretPatterns, digests: Mapping[str, str]) -> Iterator[Finding]:
    """FQ006. In tensors that an export writes again from the truth there is nothing else to look for."""
    reproduced = folder.opened is not None and folder.opened.reproduced
    for name, digest in digests.items():
        if digest == NOT_READ:
            message = f"{ordinary(name)} is larger than any such file, and was not read"
            yield SECRET_IN_BYTES.finding(folder.scope, message)
            continue
        path = folder.folder / name
        problems = list(dict.fromkeys(find_problems(path, patterns)))
        explained = reproduced and path.suffix == ".safetensors"
        if not explained and _holds_key(path, patterns) and not any("key" in problem for problem in problems):
            problems.append("holds the job's key")
        for problem in problems:
            yield SECRET_IN_BYTES.finding(folder.scope, f"{ordinary(name)} {problem}")


def _holds_key(path: Path, patterns: SecretPatterns) -> bool:
    """Is the key in one of all bytes of a file?"""
    tail = b""
    with open(open_regular_file(path), "rb") as file:
        while patterns.raw and (piece := file.read(_PIECE)):
            if patterns.in_bytes(tail + piece[: patterns.longest]) or patterns.in_bytes(piece):
                return True
            tail = piece[-patterns.longest :]
    return False


def _listing(folder: ProxyFolder, proxy: OpenedProxy, digests: Mapping[str, str]) -> Iterator[Finding]:
    """Files against proxy.json."""
    listed, scope = proxy.manifest.files, proxy.scope
    for name, digest in sorted(listed.items()):
        if name not in digests:
            yield UNLISTED_CONTENT.finding(scope, f"{ordinary(name)} is listed in proxy.json, but missing")
        elif digests[name] != digest:
            yield UNLISTED_CONTENT.finding(scope, f"{ordinary(name)} is not the file that proxy.json lists")
        known = is_companion(name) or name in ("config.json", VISIBLE_TENSORS) or _MODEL_FILE.fullmatch(name)
        if not known:
            yield UNLISTED_CONTENT.finding(scope, f"{ordinary(name)} is not part of a proxy")
    for name in digests:
        if name not in listed and name not in (PROXY_MANIFEST, SIGNATURE):
            yield UNLISTED_CONTENT.finding(scope, f"{ordinary(name)} is not listed in proxy.json")
    for path in folder.folder.iterdir():
        if path.is_dir() or not path.exists():
            yield UNLISTED_CONTENT.finding(scope, "holds a folder or a broken link")
    if proxy.units.unknown_tensors():
        yield UNLISTED_CONTENT.finding(scope, "visible.safetensors holds a tensor that is not a group")


def _tensors(inputs: Inputs, proxy: OpenedProxy) -> Iterator[Finding]:
    """Tensors that the truth does not have, in either direction."""
    if inputs.truth is None:
        return
    specs = {
        spec.name
        for spec in tensor_specs(tensor_tasks(inputs.truth, proxy.manifest.quantization, lambda _: None), None)
    }
    for name in sorted(set(proxy.tensors) - specs):
        yield UNLISTED_CONTENT.finding(proxy.scope, "a tensor that the model does not have", tensor=name)
    for name in sorted(specs - set(proxy.tensors)):
        yield UNLISTED_CONTENT.finding(proxy.scope, "a tensor of the model is missing", tensor=name)


def _ledger_line(inputs: Inputs, proxy: OpenedProxy) -> Iterator[Entry]:
    """Is the proxy in the ledger, as it is?"""
    scope = f"{proxy.scope} in the ledger"
    if inputs.releases is None:
        more = "; without it client, round and the mask of this client only are taken on trust"
        yield UNLISTED_CONTENT.lacks(scope, LEDGER, more=more)
        return
    release, manifest, problem = inputs.release(proxy), proxy.manifest, None
    if release is None:
        problem = "the ledger does not list this proxy"
    elif release.proxy_sha256 != proxy.sha256:
        problem = "proxy.json is not the one that was released under its id"
    elif any(getattr(release, name) != getattr(manifest, name) for name in _TOLD_TWICE):
        problem = "proxy.json and the ledger disagree about this release"
    found = [] if problem is None else [UNLISTED_CONTENT.finding(scope, problem)]
    yield from UNLISTED_CONTENT.checked(scope, "proxy.json was compared with its ledger line", found)
