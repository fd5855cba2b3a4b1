"""SHA-256 of all files of proxies."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from fedqsn_cli.artifacts.manifests import file_digest
from fedqsn_cli.auditing.inputs import Inputs, ProxyFolder
from fedqsn_cli.auditing.opened_proxy import OpenedProxy
from fedqsn_cli.checkpoint import read_header
from fedqsn_cli.checkpoint.companions import MAX_COMPANION_BYTES
from fedqsn_cli.errors import FedqsnError, FormatError

Digests = dict[str, str]
"""SHA-256 in hexadecimal, by file name; NOT_READ for what is larger than any such file."""

NOT_READ = "-"
_MOST_ENTRIES = 10_000  # of a folder, before none of it is read: it is no proxy, but a disk


def digests_of(inputs: Inputs, folder: ProxyFolder | OpenedProxy) -> Digests:
    """The digests of a folder's files, taken by whoever needs them first. Raises FedqsnError, OSError."""
    return inputs.shared(f"digests of {folder.scope}", lambda: _hashed(folder.folder, taken_of(inputs, folder)))


def taken_of(inputs: Inputs, folder: ProxyFolder | OpenedProxy) -> Digests:
    """The digests that were taken while the folder was read for something else, which fills this."""
    return inputs.shared(f"digests that were taken of {folder.scope}", dict[str, str])


def _hashed(folder: Path, taken: Digests) -> Digests:
    found = {str(path.relative_to(folder)): path for path in files_of(folder)}
    return {
        name: NOT_READ if is_oversized(path) else taken.get(name) or file_digest(path) for name, path in found.items()
    }


def files_of(folder: Path) -> list[Path]:
    """All files in a folder, at any depth; none if there is no such folder, which whoever opens the proxy says.

    Raises:
        FormatError: there are more than any proxy has. OSError: a folder in it cannot be read.
    """
    entries = list(islice(_entries(folder), _MOST_ENTRIES + 1))
    if len(entries) > _MOST_ENTRIES:
        raise FormatError(f"holds more than {_MOST_ENTRIES} files and folders", where=folder)
    return sorted(path for path in entries if path.is_file())


def _entries(folder: Path) -> Iterator[Path]:
    """Everything in a folder, at any depth; links to folders are not followed."""
    waiting = [folder] if folder.is_dir() else []
    while waiting:
        for path in waiting.pop().iterdir():
            yield path
            if path.is_dir() and not path.is_symlink():
                waiting.append(path)


def is_oversized(path: Path) -> bool:
    """Is a file larger than any that goes with a model? One of tensors may be, if its header says so."""
    if path.stat().st_size <= MAX_COMPANION_BYTES:
        return False
    try:
        return path.suffix != ".safetensors" or not read_header(path).entries
    except FedqsnError:
        return True
