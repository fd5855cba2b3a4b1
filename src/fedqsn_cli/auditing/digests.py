"""SHA-256 of all files of proxies, taken while the export that makes them again keeps the other processors busy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from threading import Event

from fedqsn_cli.auditing.inputs import Inputs, ProxyFolder
from fedqsn_cli.checkpoint import read_header
from fedqsn_cli.checkpoint.companions import MAX_COMPANION_BYTES
from fedqsn_cli.checkpoint.files import open_regular_file
from fedqsn_cli.errors import FedqsnError, FormatError

Digests = dict[str, str]
"""SHA-256 in hexadecimal, by file name; NOT_READ for what is larger than any such file."""

NOT_READ = "-"
_PIECE = 1 << 22
_MOST_ENTRIES = 10_000  # of a folder, before none of it is read: it is no proxy, but a disk


def digests_of(inputs: Inputs, folder: ProxyFolder) -> Digests:
    """The digests of a folder's files, taken by whoever needs them first. Raises FedqsnError, OSError."""
    return inputs.shared(f"digests of {folder.scope}", lambda: _hashed(folder.folder, Event()))


@contextmanager
def taken_behind(inputs: Inputs, folders: Sequence[ProxyFolder]) -> Iterator[list[Callable[[], Digests]]]:
    """Take digests in a thread; each call waits for those of one folder. What nobody waits for is given up."""
    given_up = Event()

    def started(folder: ProxyFolder) -> Callable[[], Digests]:
        taken = thread.submit(_hashed, folder.folder, given_up)
        return lambda: inputs.shared(f"digests of {folder.scope}", taken.result)

    with ThreadPoolExecutor(1, "fedqsn-digest") as thread:
        try:
            yield [started(folder) for folder in folders]
        finally:
            given_up.set()


def _hashed(folder: Path, given_up: Event) -> Digests:
    return {
        str(path.relative_to(folder)): NOT_READ if is_oversized(path) else _sha256(path, given_up)
        for path in files_of(folder)
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


def _sha256(path: Path, given_up: Event) -> str:
    sha256 = hashlib.sha256()
    with open(open_regular_file(path), "rb") as file:
        while not given_up.is_set() and (piece := file.read(_PIECE)):
            sha256.update(piece)
    return sha256.hexdigest()


def is_oversized(path: Path) -> bool:
    """Is a file larger than any that goes with a model? One of tensors may be, if its header says so."""
    if path.stat().st_size <= MAX_COMPANION_BYTES:
        return False
    try:
        return path.suffix != ".safetensors" or not read_header(path).entries
    except FedqsnError:
        return True
