"""Work runs ahead of use, in order, and no further than it may."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from fedqsn_cli.kernels.read_ahead import announced, compute_ahead, read_ahead


def test_results_come_in_the_order_of_the_calls() -> None:
    with ThreadPoolExecutor(4) as pool:
        assert list(read_ahead(pool, [partial(pow, i, 2) for i in range(100)], depth=5)) == [i * i for i in range(100)]


def test_what_comes_after_none_starts_when_everything_before_it_was_used() -> None:
    used: list[int] = []
    calls: list[Callable[[], list[int]] | None] = [used.copy, used.copy, None, used.copy]
    with ThreadPoolExecutor(2) as pool:
        for number, seen in enumerate(read_ahead(pool, calls, depth=10)):
            assert number < 2 or seen == [0, 1]
            used.append(number)
    assert used == [0, 1, 2]


def test_the_first_failure_in_order_is_raised() -> None:
    def fail(number: int) -> int:
        raise KeyError(number)

    with ThreadPoolExecutor(4) as pool, pytest.raises(KeyError, match="0"):
        list(read_ahead(pool, [partial(fail, i) for i in range(10)], depth=4))


def test_workers_compute_in_order_too() -> None:
    assert list(compute_ahead(partial(pow, i, 2) for i in range(100))) == [i * i for i in range(100)]


def test_items_are_announced_before_those_ahead_of_them_are_used() -> None:
    told: list[int] = []
    for number in announced(range(10), told.append, distance=3):
        assert told == list(range(min(10, number + 4)))
