"""Files that are open for reading: at most 64 at a time, however many checkpoints and updates are read."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.checkpoint.direct_io import is_uncached, read_direct
from fedqsn_cli.checkpoint.files import open_regular_file
from fedqsn_cli.checkpoint.header import FileIdentity
from fedqsn_cli.errors import FormatError
from fedqsn_cli.linux import set_direct

MAX_OPEN_FILES = 64


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


class DirectFile:
    """One version of a file that may not be in the page cache; that is found out at the first read."""

    def __init__(self, file: Path, identity: FileIdentity) -> None:
        self._file = file
        self._identity = identity
        self._uncached: bool | None = None

    def read(self, start: int, count: int) -> NDArray[np.uint8] | None:
        """`count` bytes from an absolute offset on, past the page cache; None where reading through it is better.

        Raises:
            FormatError: the file is another one now.
        """
        if self._uncached is None:
            with DESCRIPTORS.borrow(self._file, self._identity) as descriptor:
                self._uncached = is_uncached(descriptor, self._identity.size)
        if not self._uncached:
            return None
        with DESCRIPTORS.borrow(self._file, self._identity, direct=True) as descriptor:
            found = read_direct(descriptor, start, count)
        self._uncached = found is not None
        return found if found is not None and len(found) == count else None
