"""Ranges cover everything once, in any number of threads, and never wait for themselves."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqsn_cli.errors import InputError
from fedqsn_cli.kernels.threads import run_ranges, thread_count, work_alone
from support.passes import threads_of


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    with threads_of(4):
        yield


@given(st.integers(0, 5000), st.integers(1, 700))
def test_ranges_are_disjoint_aligned_and_cover_everything(n: int, align: int) -> None:
    seen: list[tuple[int, int]] = []
    run_ranges(n, align, lambda start, stop: seen.append((start, stop)))
    assert all(start % align == 0 and start < stop for start, stop in seen)
    assert [i for start, stop in sorted(seen) for i in range(start, stop)] == list(range(n))


def test_ranges_run_at_the_same_time() -> None:
    barrier = threading.Barrier(4, timeout=300)
    run_ranges(4, 1, lambda start, stop: barrier.wait())  # type: ignore[arg-type, return-value]


def test_ranges_inside_ranges_do_not_wait_for_the_pool() -> None:
    seen: list[int] = []
    run_ranges(8, 1, lambda start, stop: run_ranges(8, 1, lambda a, b: seen.append(b - a)))
    assert sum(seen) == 8 * 4  # one inner range in each of the four outer ones


def test_the_first_failure_is_raised_after_all_ranges_ended() -> None:
    ended: list[int] = []

    def work(start: int, stop: int) -> None:
        ended.append(start)
        if start:
            raise KeyError(start)

    with pytest.raises(KeyError, match="1"):
        run_ranges(4, 1, work)
    assert sorted(ended) == [0, 1, 2, 3]


def test_a_thread_that_works_alone_calls_its_ranges_itself() -> None:
    seen: list[int] = []
    with ThreadPoolExecutor(1, initializer=work_alone) as pool:
        pool.submit(run_ranges, 4000, 1, lambda start, stop: seen.append(stop - start)).result()
    assert seen == [4000]


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "9999", "²"])
def test_a_number_of_threads_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDQSN_THREADS", text)
    thread_count.cache_clear()
    try:
        with pytest.raises(InputError):
            thread_count()
    finally:
        thread_count.cache_clear()


def test_the_number_of_threads_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDQSN_THREADS", "3")
    thread_count.cache_clear()
    try:
        assert thread_count() == 3
    finally:
        thread_count.cache_clear()
