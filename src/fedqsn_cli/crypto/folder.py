"""A flat folder as one stream of bytes, and back. The same files give the same bytes.

    8 bytes   length of the index, big-endian
    index     canonical JSON: {"files": [{"name": ..., "size": ...}, ...], "format": "fedqsn-folder/1"}, sorted by name
    files     their bytes, one after the other

Names, times and modes of the system are not in it; a reader takes plain names only, so nothing is written elsewhere.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from fedqsn_cli import strictjson
from fedqsn_cli.checkpoint import ArtifactWriter
from fedqsn_cli.checkpoint.files import open_regular_file
from fedqsn_cli.checkpoint.header import is_plain_file_name
from fedqsn_cli.checkpoint.in_order import InOrderReader, ahead
from fedqsn_cli.errors import FormatError, InputError

FORMAT = "fedqsn-folder/1"
_PIECE = 1 << 20
_LARGEST_INDEX = 1 << 24


def folder_stream(folder: Path, digests: dict[str, str] | None = None) -> Iterator[bytes]:
    """The stream of a folder.

    Args:
        digests: receives the SHA-256 of each file, of the bytes that were streamed.

    Raises:
        InputError: an entry is not a file or has a name that nobody would take, or a file changes while it is read.
    """
    sizes = {entry.name: _size(folder / entry.name) for entry in os.scandir(folder)}
    files = [{"name": name, "size": size} for name, size in sorted(sizes.items())]
    index = strictjson.dumps({"files": files, "format": FORMAT}).encode()
    yield len(index).to_bytes(8, "big") + index
    for name, size in sorted(sizes.items()):
        sha256 = hashlib.sha256() if digests is not None else None
        for piece in _contents(folder / name, size):
            if sha256 is not None:
                sha256.update(piece)
            yield piece
        if digests is not None and sha256 is not None:
            digests[name] = sha256.hexdigest()


def _size(path: Path) -> int:
    if not is_plain_file_name(path.name):
        raise InputError("has a name that is not taken", where=path, hint="remove it")
    if path.is_symlink():  # it may lead to anything, and would be sent as if it were part of the folder
        raise InputError("is a link", where=path, hint="put the file itself there")
    descriptor = open_regular_file(path)
    try:
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def _contents(path: Path, size: int) -> Iterator[bytes]:
    left = size
    with open(open_regular_file(path), "rb", buffering=0) as file:
        reader = InOrderReader(file.fileno())
        while piece := reader.read(_PIECE):
            left -= len(piece)
            yield piece
    if left:
        raise InputError("changed while it was read", where=path)


def write_folder(pieces: Iterable[bytes], writer: ArtifactWriter, where: object) -> None:
    """Write the files of a stream; they count only if this returns.

    Raises:
        FormatError: the stream is malformed, or longer or shorter than its index says. What `pieces` raises.
    """
    with closing(ahead(pieces)) as opened:
        stream = _Stream(opened, where)
        for name, size in _index(stream, where):
            writer.add_pieces(name, stream.take(size))
        stream.end()


def _index(stream: _Stream, where: object) -> list[tuple[str, int]]:
    """Names and sizes of the files. Raises FormatError."""
    length = int.from_bytes(b"".join(stream.take(8)), "big")
    if length > _LARGEST_INDEX:
        raise FormatError("the index of the folder is too long", where=where)
    document: Any = strictjson.loads(b"".join(stream.take(length)), where)
    try:
        known = document["format"] == FORMAT
        files = [(one["name"], one["size"]) for one in document["files"]]
        plain = all(len(one) == 2 for one in document["files"])  # a name and a size: no links, devices, modes
    except (KeyError, TypeError):
        raise FormatError("the index of the folder is malformed", where=where) from None
    sizes = all(type(size) is int and size >= 0 for _, size in files)
    if not known or not sizes or not plain or not all(is_plain_file_name(name) for name, _ in files):
        raise FormatError("the index of the folder has a name or size that is not taken", where=where)
    if len({name for name, _ in files}) < len(files):
        raise FormatError("the index of the folder lists a file twice", where=where)
    return files


class _Stream:
    """Pieces of any size, taken in other sizes."""

    def __init__(self, pieces: Iterator[bytes], where: object) -> None:
        self._pieces = pieces
        self._where = where
        self._held = memoryview(b"")

    def take(self, count: int) -> Iterator[memoryview]:
        """The next bytes, so many of them. Raises FormatError: the stream ends before."""
        while count:
            if not self._held:
                piece = next(self._pieces, None)
                if piece is None:
                    raise FormatError("ends before its last file does", where=self._where)
                self._held = memoryview(piece)
            part, self._held = self._held[:count], self._held[count:]
            count -= len(part)
            yield part

    def end(self) -> None:
        """Check that nothing is left. Raises FormatError."""
        if self._held or any(self._pieces):
            raise FormatError("goes on after its last file", where=self._where)
