"""Writing files in the background: past the page cache, hashed on the way, in constant memory.

    write() --copy--> aligned buffer --+--> writer thread: pwrite, O_DIRECT where the file system can
                                       +--> hasher thread: digest, in file order

At most `IN_FLIGHT_BYTES` wait for the two threads; then write() waits too. Going past the page cache matters because
filling it costs more processor time than the copy, the hash and the disk together. Many files can share the threads
and the buffers, which are smaller then: each file that is being written holds one that is not full yet.
"""

from __future__ import annotations

import bisect
import errno
import mmap
import os
import resource
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fedqsn_cli.kernels.digests import Algorithm, Hash, new_hash
from fedqsn_cli.linux import PAGE, reserve, set_direct

BUFFER_BYTES = 4 << 20
SMALLEST_BUFFER = 256 << 10  # below, the disk slows down
HELD_BYTES = 64 << 20  # in buffers that are not full yet, as long as that leaves them SMALLEST_BUFFER
IN_FLIGHT_BYTES = 32 << 20
OPEN_FILES = 128  # of everything else, inputs included


@dataclass(slots=True)
class _Chunk:
    """A full buffer on its way to the disk and to the hash."""

    stream: FileStream
    offset: int
    length: int
    buffer: mmap.mmap
    pending: int  # threads that have not finished with it


class WriterThreads:
    """The background threads and the buffers that they share. An error in one stops both.

    Args:
        files: how many files are written at the same time, about.
        digest: of the files; None where nobody wants to know it.
    """

    def __init__(self, files: int = 1, *, digest: Algorithm | None = "sha256") -> None:
        share = 1 << max(HELD_BYTES // max(files, 1), 1).bit_length() - 1
        self.buffer_bytes = max(SMALLEST_BUFFER, min(BUFFER_BYTES, share))
        self.digest = digest
        self._most = IN_FLIGHT_BYTES // self.buffer_bytes
        self._changed = threading.Condition()
        self._jobs: tuple[Callable[[_Chunk], None], ...] = (_write,) if digest is None else (_write, _hash)
        self._queues: tuple[deque[_Chunk], ...] = tuple(deque() for _ in self._jobs)
        self._free: list[mmap.mmap] = []
        self._in_flight = 0
        self._error: BaseException | None = None
        self._stopped = False
        self._threads: list[threading.Thread] = []

    def buffer(self) -> mmap.mmap:
        """A page-aligned buffer to fill; waits while too many are on their way."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._free or self._in_flight < self._most)
            self.check()
            if self._free:
                return self._free.pop()
        return mmap.mmap(-1, self.buffer_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def submit(self, stream: FileStream, offset: int, length: int, buffer: mmap.mmap) -> None:
        """Hand over a buffer. The caller must not touch it again."""
        chunk = _Chunk(stream, offset, length, buffer, len(self._jobs))
        with self._changed:
            self.check()
            if not self._threads:
                self._start()
            self._in_flight += 1
            for queue in self._queues:
                queue.append(chunk)
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait until everything submitted is written and hashed."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or not self._in_flight)
            self.check()

    def stop(self) -> None:
        """End the threads; what still waits is thrown away."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._free.clear()

    def check(self) -> None:
        """Raise, as it was, the error that stopped a background thread."""
        if self._error is not None:
            raise self._error
        if self._stopped:
            raise RuntimeError("writing goes on after it was given up")

    @property
    def _over(self) -> bool:
        return self._stopped or self._error is not None

    def _start(self) -> None:
        for queue, work in zip(self._queues, self._jobs, strict=True):
            thread = threading.Thread(target=self._run, args=(queue, work), name=f"fedqsn{work.__name__}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _run(self, queue: deque[_Chunk], work: Callable[[_Chunk], None]) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: queue or self._over)
                if self._over:
                    return
                chunk = queue.popleft()
            try:
                work(chunk)
            except BaseException as error:
                with self._changed:
                    self._error = self._error or error
                    self._changed.notify_all()
                return
            self._done(chunk)

    def _done(self, chunk: _Chunk) -> None:
        with self._changed:
            chunk.pending -= 1
            if not chunk.pending:
                self._in_flight -= 1
                self._free.append(chunk.buffer)
                self._changed.notify_all()


def _write(chunk: _Chunk) -> None:
    chunk.stream.store(chunk.buffer, chunk.offset, chunk.length)


def _hash(chunk: _Chunk) -> None:
    assert chunk.stream.digest is not None  # the thread runs where there is one
    chunk.stream.digest.update(memoryview(chunk.buffer)[: chunk.length])


@dataclass(slots=True)
class FileStream:
    """One file of a known size, written in any order, every byte exactly once.

    Bytes that come in file order go straight to the writer threads. Others, which come where a writer sorts its
    tensors otherwise than its caller passes them, go into the file through the page cache, and are read back from there
    in file order.
    """

    path: Path
    size: int
    threads: WriterThreads
    digest: Hash | None = field(init=False)
    _descriptor: int = -1
    _cached_descriptor: int = -1  # a second descriptor, through the page cache
    _direct: bool = False
    _written_up_to: int = 0  # every byte before it was given to the threads
    _out_of_order: list[tuple[int, int]] = field(default_factory=list)  # [start, end) beyond that, sorted
    _buffer: mmap.mmap | None = None
    _stored: int = 0

    def __post_init__(self) -> None:
        self.digest = new_hash(self.threads.digest) if self.threads.digest is not None else None

    def create(self) -> None:
        """Create the file and reserve its space, so that a full disk is known now; its mode follows the umask.

        Raises:
            OSError: the disk is full or failed.
        """
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            reserve(descriptor, self.size)
        finally:
            os.close(descriptor)

    def _open(self) -> None:
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        if self.size >= self.threads.buffer_bytes:
            self._direct = set_direct(self._descriptor, True)

    @property
    def complete(self) -> bool:
        """Whether every byte was written."""
        return self._written_up_to == self.size

    def write(self, offset: int, data: memoryview) -> None:
        """Take the bytes [offset, offset + len(data)) of the file; the data is copied.

        Raises:
            RuntimeError: one of the bytes was written before (a bug in the caller).
            OSError: an earlier write failed.
        """
        if self._descriptor < 0:
            self._open()  # not before the first byte, so that few files are open at a time
        end = offset + len(data)
        position = bisect.bisect_left(self._out_of_order, (offset, offset))
        before = self._out_of_order[position - 1][1] if position else self._written_up_to
        after = self._out_of_order[position][0] if position < len(self._out_of_order) else self.size
        if offset < max(before, self._written_up_to) or end > after:
            raise RuntimeError(f"bytes [{offset}, {end}) of {self.path.name} are written twice or outside of it")
        if offset == self._written_up_to:
            self._append(data)
            self._append_out_of_order()
        else:
            self._write_out_of_order(offset, data)
            self._out_of_order.insert(position, (offset, end))

    def _append(self, data: memoryview) -> None:
        """Copy the next bytes in file order into buffers; hand over those that are full."""
        size = self.threads.buffer_bytes
        while len(data):
            if self._buffer is None:
                self._buffer = self.threads.buffer()
            filled = self._written_up_to % size
            count = min(len(data), size - filled)
            self._buffer[filled : filled + count] = data[:count]
            self._written_up_to += count
            data = data[count:]
            if self._written_up_to % size == 0 or self.complete:
                offset = (self._written_up_to - 1) // size * size
                buffer, self._buffer = self._buffer, None
                self.threads.submit(self, offset, self._written_up_to - offset, buffer)

    def _write_out_of_order(self, offset: int, data: memoryview) -> None:
        if self._cached_descriptor < 0:
            self._cached_descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        while len(data):
            count = os.pwrite(self._cached_descriptor, data, offset)
            offset, data = offset + count, data[count:]

    def _append_out_of_order(self) -> None:
        """Append bytes that came early and are next now."""
        while self._out_of_order and self._out_of_order[0][0] == self._written_up_to:
            start, end = self._out_of_order.pop(0)
            for position in range(start, end, BUFFER_BYTES):
                data = os.pread(self._cached_descriptor, min(BUFFER_BYTES, end - position), position)
                self._append(memoryview(data))

    def store(self, buffer: mmap.mmap, offset: int, length: int) -> None:
        """Write one buffer; after the last one, sync and close. Runs in the writer thread."""
        padded = -(-length // PAGE) * PAGE if self._direct else length
        view = memoryview(buffer)[:padded]
        while len(view):
            count = self._pwrite(view, offset)
            offset, view = offset + count, view[count:]
        self._stored += length
        if self._stored == self.size:
            if self._direct:
                os.ftruncate(self._descriptor, self.size)
            os.fsync(self._descriptor)
            self.close()

    def _pwrite(self, view: memoryview, offset: int) -> int:
        try:
            return os.pwrite(self._descriptor, view, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._direct:
                raise
            self._direct = set_direct(self._descriptor, False)  # this file system refuses after all
            return os.pwrite(self._descriptor, view, offset)

    def close(self) -> None:
        """Close the descriptors; writing is over."""
        for descriptor in (self._descriptor, self._cached_descriptor):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._cached_descriptor = -1


def allow_open_files(count: int) -> int:
    """Raise this process's limit of open files, as far as it may, so that it can open `count` more.

    Returns:
        How many more it can open.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit, wanted = soft, count + OPEN_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = max(soft, wanted if hard == resource.RLIM_INFINITY else min(wanted, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return count if limit == resource.RLIM_INFINITY else limit - len(os.listdir("/proc/self/fd"))
