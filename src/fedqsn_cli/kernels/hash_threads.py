"""A few threads that compute digests behind the work. However many digests there are, few pieces wait to be hashed."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from fedqsn_cli.kernels.threads import thread_count

MOST_THREADS = 4  # each hashes faster than most disks read
MOST_WAITING = 12  # pieces of a few MiB


class HashThreads:
    """Threads for digests. Use as a context manager: what still waits at the end is hashed first."""

    def __init__(self) -> None:
        self._pools = [ThreadPoolExecutor(1, "fedqsn-digest") for _ in range(min(MOST_THREADS, thread_count()))]
        self._next = itertools.cycle(self._pools)
        self._slots = threading.BoundedSemaphore(MOST_WAITING)

    def queue(self) -> HashQueue:
        """A queue for one digest, or for several that need not run at once."""
        return HashQueue(next(self._next), self._slots)

    def __enter__(self) -> HashThreads:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools:
            pool.shutdown()


class HashQueue:
    """Calls that run one after the other in a thread; `submit` waits while too much waits in all queues."""

    def __init__(self, pool: ThreadPoolExecutor, slots: threading.BoundedSemaphore) -> None:
        self._pool = pool
        self._slots = slots

    def submit(self, call: Callable[[memoryview], object], data: memoryview) -> Future[None]:
        """Run call(data) after everything that was submitted before."""
        self._slots.acquire()
        try:
            return self._pool.submit(self._run, call, data)
        except BaseException:
            self._slots.release()
            raise

    def _run(self, call: Callable[[memoryview], object], data: memoryview) -> None:
        try:
            call(data)
        finally:
            self._slots.release()
