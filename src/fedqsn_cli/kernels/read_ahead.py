"""Run calls ahead of their use, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

from fedqsn_cli.kernels.threads import thread_count, work_alone

T = TypeVar("T")

MOST_WORKERS = 4  # calls at once; together faster than one thread hashes
WAITING = 2  # calls that wait for the disk, about, while others compute


def read_ahead(pool: Executor, calls: Iterable[Callable[[], T] | None], depth: int) -> Iterator[T]:
    """Results of the calls in order, up to `depth` of them made ahead of use in the pool's threads.

    Args:
        calls: None among them stands for: what comes next is not started before all results so far were used.
    """
    waiting: deque[Future[T]] = deque()
    try:
        for call in calls:
            if call is not None:
                waiting.append(pool.submit(call))
            while len(waiting) > (depth if call is not None else 0):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def compute_ahead(calls: Iterable[Callable[[], T] | None]) -> Iterator[T]:
    """Results of the calls in order, as `read_ahead` gives them.

    A call reads from the disk, and then keeps one processor busy, kernels included.
    """
    threads = thread_count()
    count = min(MOST_WORKERS, threads + WAITING) if threads > 1 else 1
    with ThreadPoolExecutor(count, "fedqsn-worker", work_alone) as workers:
        yield from read_ahead(workers, calls, depth=count)
