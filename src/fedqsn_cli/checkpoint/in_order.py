"""Plain files from their beginning to their end: past the page cache where that is cheaper, ahead of their reader.

Bringing bytes into the cache costs more processor time than hashing them, and a large file pushes out of it what the
machine works with. `stream.py` writes tensors like that, in any order and in threads.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fedqsn_cli.checkpoint.direct_io import is_uncached
from fedqsn_cli.linux import PAGE, set_direct

T = TypeVar("T")
BUFFER_BYTES = 4 << 20
_AHEAD = 4  # pieces


class InOrderReader:
    """Reads a file from its beginning to its end; past the page cache if it is not in it.

    Args:
        descriptor: of a plain file, open for reading; its position and flags are this reader's.

    Example:
        >>> InOrderReader(descriptor).read(8)
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._direct = is_uncached(descriptor, os.fstat(descriptor).st_size) and set_direct(descriptor)
        self._buffer = _buffer()
        self._at = self._end = 0  # what has been read into the buffer, and not asked for yet
        os.lseek(descriptor, 0, os.SEEK_SET)

    def read(self, count: int) -> bytes:
        """So many bytes; fewer at the end only. Raises OSError: the disk failed."""
        pieces = []
        while count and (self._at < self._end or self._fill()):
            piece = self._buffer[self._at : min(self._at + count, self._end)]
            self._at += len(piece)
            count -= len(piece)
            pieces.append(piece)
        return b"".join(pieces)

    def _fill(self) -> bool:
        self._at = 0
        try:
            self._end = os.readv(self._descriptor, [self._buffer])
        except OSError as error:
            if error.errno != errno.EINVAL or not self._direct:
                raise
            self._direct = set_direct(self._descriptor, False)  # it is refused after all
            self._end = os.readv(self._descriptor, [self._buffer])
        if self._direct and self._end % PAGE:  # the end of the file; no page begins here
            self._direct = set_direct(self._descriptor, False)
        return self._end > 0


class InOrderWriter:
    """Writes bytes one after the other: full buffers with O_DIRECT where the file system can, the rest as any program.

    Args:
        descriptor: open for writing; its flags are this writer's until `finish`.
        offset: of the first byte. Where no page of the disk begins there, O_DIRECT is not used.

    Example:
        >>> writer = InOrderWriter(descriptor)
        >>> writer.write(b"first, ")
        >>> writer.write(b"second")
        >>> writer.finish()
    """

    def __init__(self, descriptor: int, offset: int = 0) -> None:
        self._descriptor = descriptor
        self._offset = offset
        self._buffer: mmap.mmap | None = None
        self._filled = 0
        self._direct = False
        self._refused = offset % PAGE != 0

    def write(self, data: bytes | memoryview) -> None:
        """Take the next bytes; they are copied. Raises OSError: the disk is full or failed."""
        view = memoryview(data)
        while len(view):
            if self._buffer is None:
                self._buffer = _buffer()
            count = min(len(view), BUFFER_BYTES - self._filled)
            self._buffer[self._filled : self._filled + count] = view[:count]
            self._filled += count
            view = view[count:]
            if self._filled == BUFFER_BYTES:
                self._store(self._buffer, direct=not self._refused)

    def finish(self) -> None:
        """Write what is left; nothing is synced. Raises OSError: the disk is full or failed."""
        if self._buffer is not None:
            self._store(self._buffer, direct=False)
            self._buffer.close()
            self._buffer = None

    def _store(self, buffer: mmap.mmap, direct: bool) -> None:
        if direct != self._direct:
            self._direct = set_direct(self._descriptor, direct)
            self._refused |= direct and not self._direct
        done = 0
        while done < self._filled:
            with memoryview(buffer) as view:
                done += self._pwrite(view[done : self._filled], self._offset + done)
        self._offset, self._filled = self._offset + done, 0

    def _pwrite(self, view: memoryview, offset: int) -> int:
        with view:
            try:
                return os.pwrite(self._descriptor, view, offset)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._refused, self._direct = True, set_direct(self._descriptor, False)  # it is refused after all
                return os.pwrite(self._descriptor, view, offset)


def _buffer() -> mmap.mmap:
    """Memory of whole pages, as O_DIRECT wants it."""
    return mmap.mmap(-1, BUFFER_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def ahead(pieces: Iterable[T]) -> Generator[T, None, None]:
    """The same pieces, made in a thread of their own while the caller works with those before them.

    Close it where it may not be taken to its end (`contextlib.closing`).

    Raises:
        What `pieces` raises, in its place.
    """
    source, end, thread = iter(pieces), object(), ThreadPoolExecutor(1)
    try:
        waiting = deque(thread.submit(next, source, end) for _ in range(_AHEAD))
        while (piece := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, source, end))
            yield piece  # type: ignore[misc]  # it is not `end`
    finally:
        thread.shutdown(cancel_futures=True)
