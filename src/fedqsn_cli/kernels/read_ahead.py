"""Run calls ahead of their use, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

from fedqsn_cli.kernels.threads import thread_count, work_alone

T = TypeVar("T")

MOST_WORKERS = 4  # calls at once; together faster than one thread hashes
ANNOUNCED = 2  # what is read while what comes before it is computed


def announced(items: Iterable[T], announce: Callable[[T], object], distance: int = ANNOUNCED) -> Iterator[T]:
    """The items, each of them announced when so many others are still to come before it."""
    waiting: deque[T] = deque()
    for item in items:
        announce(item)
        waiting.append(item)
        if len(waiting) > distance:
            yield waiting.popleft()
    yield from waiting


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

    A call keeps one processor busy, kernels included; now and then it waits for the disk, and another takes its place.
    """
    threads = thread_count()
    count = min(MOST_WORKERS, threads + 1) if threads > 1 else 1
    with ThreadPoolExecutor(count, "fedqsn-worker", work_alone) as workers:
        yield from read_ahead(workers, calls, depth=count)
