"""A file in parts, each with its digest; a download goes on with what is missing, and appears with one rename.

NAME.part       the file, as long as it will be; parts are written in their places
NAME.part.have  a line for each part that is complete and synced: start, length, SHA-256
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from fedqsn_cli.checkpoint.files import sync_directory, write_all
from fedqsn_cli.errors import FormatError, InputError

PART = 128 << 20
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a file.

    Args:
        start, length: in bytes. reference: under which the sender offers it.
    """

    start: int
    length: int
    sha256: str
    reference: str = ""


@dataclass(frozen=True, slots=True)
class Offer:
    """A file that can be fetched: its size and its parts, in order and without gaps."""

    size: int
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, path: Path, offer: Callable[[Path, Part], str], size: int = PART) -> Self:
        """Offer a file.

        Args:
            offer: makes a part available, and returns its reference. size: of a part.
        """
        total = path.stat().st_size
        parts = [Part(start, length, sha256) for start, length, sha256 in _digests(path, total, size)]
        offered = [Part(one.start, one.length, one.sha256, offer(path, one)) for one in parts]
        return cls(total, tuple(offered))

    def to_document(self) -> dict[str, Any]:
        """As messages carry it."""
        return {"size": self.size, "parts": [[p.start, p.length, p.sha256, p.reference] for p in self.parts]}

    @classmethod
    def from_document(cls, document: Any) -> Self:
        """Raises FormatError: it is malformed, or has gaps."""
        try:
            parts = [Part(start, length, sha256, name) for start, length, sha256, name in document["parts"]]
            made = cls(document["size"], tuple(parts))
            ends = [0, *(part.start + part.length for part in made.parts)]
            whole = [part.start for part in made.parts] == ends[:-1] and ends[-1] == made.size
            if whole and all(part.length > 0 and len(bytes.fromhex(part.sha256)) == 32 for part in made.parts):
                return made
        except (KeyError, TypeError, ValueError):
            pass
        raise FormatError("is no list of parts", where="offer")


def _digests(path: Path, total: int, size: int) -> Iterator[tuple[int, int, str]]:
    with path.open("rb") as file:
        for start in range(0, total, size):
            left = length = min(size, total - start)
            sha256 = hashlib.sha256()
            while left:
                piece = file.read(min(left, _PIECE))
                if not piece:
                    raise InputError("changed while it was read", where=path)
                sha256.update(piece)
                left -= len(piece)
            yield start, length, sha256.hexdigest()


@dataclass(slots=True)
class PartWriter:
    """Takes the bytes of one part in order, into its place; `finish` tells whether they are the right ones."""

    path: Path
    part: Part
    _descriptor: int = -1
    _taken: int = 0
    _sha256: Any = field(default_factory=hashlib.sha256)

    def write(self, data: bytes) -> int:
        """Take the next bytes; returns how many came so far. Raises FormatError: there are too many."""
        if self._descriptor < 0:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
            os.lseek(self._descriptor, self.part.start, os.SEEK_SET)
        self._taken += len(data)
        if self._taken > self.part.length:
            raise FormatError("a part is longer than it was said to be", where=self.path)
        self._sha256.update(data)
        write_all(self._descriptor, data)
        return self._taken

    def finish(self) -> None:
        """Sync the part. Raises FormatError: it is short, or another one."""
        if self._taken != self.part.length or self._sha256.hexdigest() != self.part.sha256:
            raise FormatError("a part did not arrive as it was sent", where=self.path)
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; does nothing the second time."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def fetch_file(offer: Offer, target: Path, fetch: Callable[[Part, PartWriter], None]) -> int:
    """Fetch the parts that are missing; the file appears when all are there.

    Args:
        fetch: gets one part, and writes it.

    Returns:
        How many parts were there before.

    Raises:
        FormatError: a part did not arrive as it was sent. What `fetch` raises.
    """
    staging, record = target.with_name(target.name + ".part"), target.with_name(target.name + ".part.have")
    have = set(record.read_text().splitlines()) if record.exists() and staging.exists() else set()
    if not staging.exists() or staging.stat().st_size != offer.size:
        with staging.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, offer.size) if offer.size else None
        have = set()
    with record.open("a" if have else "w") as known:
        for part in offer.parts:
            line = f"{part.start} {part.length} {part.sha256}"
            if line not in have:
                _fetch_part(part, staging, fetch)
                known.write(line + "\n")
                known.flush()
    record.unlink()
    os.replace(staging, target)
    sync_directory(target.parent)
    return len(have & {f"{part.start} {part.length} {part.sha256}" for part in offer.parts})


def _fetch_part(part: Part, staging: Path, fetch: Callable[[Part, PartWriter], None]) -> None:
    writer = PartWriter(staging, part)
    try:
        fetch(part, writer)
        writer.finish()
    finally:
        writer.close()
