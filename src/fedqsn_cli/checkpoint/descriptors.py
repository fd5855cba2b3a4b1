"""Files that are open for reading: at most 64 at a time, however many checkpoints and updates are read."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.checkpoint.direct_io import is_uncached, read_direct
from fedqsn_cli.checkpoint.files import open_regular_file
from fedqsn_cli.checkpoint.header import FileIdentity
from fedqsn_cli.errors import FormatError
from fedqsn_cli.kernels.threads import reading_threads
from fedqsn_cli.linux import set_direct

MAX_OPEN_FILES = 64
LARGEST_EXPECTED, MOST_EXPECTED = 8 << 20, 96 << 20  # bytes of a piece that is read ahead, and of all of a file
READ_AHEAD = 1 << 20  # bytes before a piece that are dropped with it: a large page may cross its start


@dataclass(slots=True)
class _Slot:
    descriptor: int
    users: int = 0
    close_pending: bool = False


class DescriptorPool:
    """At most `limit` open files, least recently used closed first; safe to use from many threads.

    A descriptor that a thread reads from is never closed under it.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._slots: OrderedDict[tuple[Path, FileIdentity, bool], _Slot] = OrderedDict()

    def __len__(self) -> int:
        return len(self._slots)

    @contextmanager
    def borrow(self, file: Path, identity: FileIdentity, *, direct: bool = False) -> Iterator[int]:
        """Lend a descriptor of that version of the file; a direct one goes past the page cache, if it can.

        Raises:
            FormatError: the file is another one now.
        """
        key = file, identity, direct
        with self._lock:
            slot = self._slots.get(key) or self._open(*key)
            self._slots.move_to_end(key)
            slot.users += 1
        try:
            yield slot.descriptor
        finally:
            with self._lock:
                slot.users -= 1
                if slot.close_pending and not slot.users:
                    os.close(slot.descriptor)

    def discard(self, file: Path, identity: FileIdentity) -> None:
        """Close that file, now or when its last user is done."""
        with self._lock:
            for direct in (False, True):
                slot = self._slots.pop((file, identity, direct), None)
                if slot is not None:
                    self._retire(slot)

    def _open(self, file: Path, identity: FileIdentity, direct: bool) -> _Slot:
        while len(self._slots) >= self._limit:
            self._retire(self._slots.popitem(last=False)[1])
        descriptor = open_regular_file(file)
        if FileIdentity.of(descriptor) != identity:
            os.close(descriptor)
            raise FormatError("changed while it was in use", where=file)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        if direct:
            set_direct(descriptor)
        return self._slots.setdefault((file, identity, direct), _Slot(descriptor))

    @staticmethod
    def _retire(slot: _Slot) -> None:
        slot.close_pending = True
        if not slot.users:
            os.close(slot.descriptor)


DESCRIPTORS = DescriptorPool(MAX_OPEN_FILES)


class StoredFile:
    """One version of a file, read past the page cache where it is not in it; that is found out at the first read.

    What will be asked for soon can be announced: it is read meanwhile, and the last such pieces are kept.

    Attributes:
        drop_behind: whether what was read through the page cache is dropped from it.
    """

    def __init__(self, path: Path, identity: FileIdentity) -> None:
        self.path = path
        self.identity = identity
        self.drop_behind = False
        self._uncached: bool | None = None
        self._expected: OrderedDict[tuple[int, int], Future[NDArray[np.uint8]]] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path) -> StoredFile:
        """The version that is there now. Raises InputError: there is no regular file."""
        descriptor = open_regular_file(path)
        try:
            return cls(path, FileIdentity.of(descriptor))
        finally:
            os.close(descriptor)

    def expect(self, start: int, count: int) -> None:
        """Begin to read the bytes [start, start + count), which `read` will be asked for in one piece.

        A large piece is left to `read`. Of pieces that nobody asks for, the last ones are kept.
        """
        if count > LARGEST_EXPECTED:
            return
        piece = reading_threads().submit(self._read, start, count)
        with self._lock:
            self._expected[start, count] = piece
            while sum(size for _, size in self._expected) > MOST_EXPECTED:
                self._expected.popitem(last=False)

    def read(self, start: int, count: int) -> NDArray[np.uint8]:
        """The bytes [start, start + count), as many of them as there are, in a fresh array, aligned for numbers.

        Raises:
            FormatError: the file is another one now.
        """
        with self._lock:
            piece = self._expected.pop((start, count), None)
        return self._read(start, count) if piece is None else piece.result()

    def view(self, start: int, count: int) -> NDArray[np.uint8]:
        """As `read`, but not to be written to, and of an expected piece, which stays, any part."""
        with self._lock:
            pieces = list(self._expected.items())
        for (begin, size), piece in pieces:
            if begin <= start and start + count <= begin + size:
                return piece.result()[start - begin : start - begin + count]
        return self._read(start, count)

    def _read(self, start: int, count: int) -> NDArray[np.uint8]:
        if self._uncached is None:
            with DESCRIPTORS.borrow(self.path, self.identity) as descriptor:
                self._uncached = is_uncached(descriptor, self.identity.size)
        if self._uncached:
            with DESCRIPTORS.borrow(self.path, self.identity, direct=True) as descriptor:
                found = read_direct(descriptor, start, count)
            if found is not None:
                return found
            self._uncached = False
        out: NDArray[np.uint8] = np.empty(count, np.uint8)
        return out[: self.read_into(start, out.data)]

    def read_into(self, start: int, out: memoryview) -> int:
        """Fill `out` with the bytes from `start` on, through the page cache; returns how many there were.

        Raises:
            FormatError: the file is another one now.
        """
        with DESCRIPTORS.borrow(self.path, self.identity) as descriptor:
            done = 0
            while done < len(out) and (got := os.preadv(descriptor, [out[done:]], start + done)):
                done += got
            if self.drop_behind:
                begin = max(0, start - READ_AHEAD)
                os.posix_fadvise(descriptor, begin, start + done - begin, os.POSIX_FADV_DONTNEED)
        return done

    def close(self) -> None:
        """Close the file; a later read opens it again."""
        DESCRIPTORS.discard(self.path, self.identity)
