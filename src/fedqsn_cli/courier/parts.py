"""A file in parts, each with its digest; a download goes on with what is missing, and appears with one rename.

NAME.part       the file, as long as it will be; parts are written in their places
NAME.part.have  a line for each part that is complete and synced: start, length, SHA-256
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from fedqsn_cli.checkpoint.files import open_regular_file, sync_directory
from fedqsn_cli.checkpoint.in_order import InOrderReader, InOrderWriter
from fedqsn_cli.errors import FormatError, InputError

PART = 128 << 20
_AT_ONCE = 2  # parts: while one is synced, or waits for its next bytes, the other goes on
_PIECE = 1 << 20
_LONGEST = 1 << 40  # bytes of a part that a list may name
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a file.

    Args:
        start, length: in bytes.
    """

    start: int
    length: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Parts:
    """All parts of a file, in order and without gaps."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, path: Path, size: int = PART) -> Self:
        """The parts of a file that is there: reads it once. Raises InputError: it cannot be opened."""
        parts = PartDigests(size)
        with open(open_regular_file(path), "rb", buffering=0) as file:
            reader = InOrderReader(file.fileno())
            while piece := reader.read(_PIECE):
                parts.add(piece)
        return cls(parts.finish())

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return sum(part.length for part in self.parts)

    def to_document(self) -> list[list[Any]]:
        """As messages carry it: length and SHA-256 of each part."""
        return [[part.length, part.sha256] for part in self.parts]

    @classmethod
    def from_document(cls, document: Any) -> Self:
        """Raises FormatError: it is malformed."""
        parts, start = [], 0
        try:
            for length, sha256 in document:
                if type(length) is not int or not 0 < length <= _LONGEST or not _SHA256.fullmatch(sha256):
                    raise ValueError
                parts.append(Part(start, length, sha256))
                start += length
        except (TypeError, ValueError):
            raise FormatError("is not a list of parts", where="parts") from None
        return cls(tuple(parts))


class PartDigests:
    """Takes the bytes of a file in order, and digests them part by part.

    Args:
        size: bytes of a part; the last one is shorter.
    """

    def __init__(self, size: int = PART) -> None:
        self._size = size
        self._made: list[Part] = []
        self._start = self._length = 0
        self._sha256 = hashlib.sha256()

    def add(self, data: bytes) -> None:
        """Take the next bytes."""
        view = memoryview(data)
        while view:
            taken = view[: self._size - self._length]
            self._sha256.update(taken)
            self._length += len(taken)
            view = view[len(taken) :]
            if self._length == self._size:
                self._end_part()

    def through(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """The same pieces; each is added as it passes."""
        for piece in pieces:
            self.add(piece)
            yield piece

    def finish(self) -> tuple[Part, ...]:
        """All parts. Nothing may be added afterwards."""
        if self._length:
            self._end_part()
        return tuple(self._made)

    def _end_part(self) -> None:
        self._made.append(Part(self._start, self._length, self._sha256.hexdigest()))
        self._start += self._length
        self._length, self._sha256 = 0, hashlib.sha256()


@dataclass(slots=True)
class PartWriter:
    """Takes the bytes of one part in order, into its place; `finish` tells whether they are the right ones."""

    path: Path
    part: Part
    _descriptor: int = -1
    _writer: InOrderWriter | None = None
    _taken: int = 0
    _sha256: Any = field(default_factory=hashlib.sha256)

    def write(self, data: bytes) -> int:
        """Take the next bytes; returns how many came so far. Raises FormatError: there are too many."""
        if self._writer is None:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
            self._writer = InOrderWriter(self._descriptor, self.part.start)
        self._taken += len(data)
        if self._taken > self.part.length:
            raise FormatError("a part is longer than it was said to be", where=self.path)
        self._sha256.update(data)
        self._writer.write(data)
        return self._taken

    def finish(self) -> None:
        """Sync the part, and keep it out of the page cache. Raises FormatError: it is short, or another one.

        A whole file would push out what the machine works with, and a page that is new to a virtual machine costs it
        far more than one that is used again.
        """
        complete = self._taken == self.part.length and self._sha256.hexdigest() == self.part.sha256
        if self._writer is None or not complete:
            raise FormatError("a part did not arrive as it was sent", where=self.path)
        self._writer.finish()
        os.fsync(self._descriptor)
        os.posix_fadvise(self._descriptor, self.part.start, self.part.length, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the file; does nothing the second time."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def fetch_file(parts: Parts, target: Path, fetch: Callable[[Part, PartWriter], None]) -> int:
    """Fetch the parts that are missing, `_AT_ONCE` of them at a time; the file appears when all are there.

    Args:
        fetch: gets one part, and writes it; called in several threads.

    Returns:
        How many parts were there before.

    Raises:
        FormatError: a part did not arrive as it was sent. InputError: the disk has no room. What `fetch` raises.
    """
    staging, record = target.with_name(target.name + ".part"), target.with_name(target.name + ".part.have")
    have = set(record.read_text().splitlines()) if record.exists() and staging.exists() else set()
    if not staging.exists() or staging.stat().st_size != parts.size:
        _reserve(staging, parts.size)
        have = set()
    with record.open("ab" if have else "wb", buffering=0) as known, ThreadPoolExecutor(_AT_ONCE) as threads:

        def keep(part: Part) -> None:
            _fetch_part(part, staging, fetch)
            known.write(f"{_line(part)}\n".encode())  # one call: lines of two threads cannot mix

        missing = [part for part in parts.parts if _line(part) not in have]
        for _ in threads.map(keep, missing):  # an error ends it, when the parts that have begun are over
            pass
    record.unlink()
    os.replace(staging, target)
    sync_directory(target.parent)
    return len(have & {_line(part) for part in parts.parts})


def _line(part: Part) -> str:
    return f"{part.start} {part.length} {part.sha256}"


def _reserve(path: Path, size: int) -> None:
    """Make a file with room for so many bytes. Raises InputError."""
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size) if size else None
        except OSError as error:
            path.unlink()
            raise InputError(f"there is no room for {size} bytes ({error.strerror})", where=path.parent) from None


def _fetch_part(part: Part, staging: Path, fetch: Callable[[Part, PartWriter], None]) -> None:
    writer = PartWriter(staging, part)
    try:
        fetch(part, writer)
        writer.finish()
    finally:
        writer.close()
