"""Run calls ahead of their use, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

T = TypeVar("T")


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
