"""One pool of threads for all kernels of the process.

Kernels release the interpreter lock and write disjoint ranges, so the result never depends on the number of threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from fedqsn_cli.errors import InputError

_worker = threading.local()


@cache
def thread_count() -> int:
    """Threads to compute with: FEDQSN_THREADS, or the CPUs that this process may use.

    Raises:
        InputError: FEDQSN_THREADS is not a number from 1 to 1024.
    """
    text = os.environ.get("FEDQSN_THREADS", "")
    if not text:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 1024:
        raise InputError(f"{text!r} is not a number of threads", where="FEDQSN_THREADS", hint="give 1 to 1024")
    return int(text)


def run_ranges(n: int, align: int, fn: Callable[[int, int], None]) -> None:
    """Call fn(start, stop) for ranges that cover [0, n), cut at multiples of `align`, in several threads at once.

    A call from inside such a range runs in its own thread: the pool never waits for itself. The first exception, in
    order of ranges, is raised after all ranges have ended.
    """
    pieces = -(-n // align)
    workers = min(thread_count(), pieces)
    if workers <= 1 or getattr(_worker, "busy", False):
        if n:
            fn(0, n)
        return
    edges = [pieces * i // workers * align for i in range(workers)] + [n]
    pool = _pool(os.getpid(), thread_count())
    futures = [pool.submit(_run, fn, *pair) for pair in zip(edges[1:], edges[2:], strict=False)]
    try:
        _run(fn, edges[0], edges[1])
    finally:
        failures = [future.exception() for future in futures]
    for failure in failures:
        if failure is not None:
            raise failure


def work_alone() -> None:
    """Let all kernels that this thread calls run in this thread: others like it keep the processors busy."""
    _worker.busy = True


def _run(fn: Callable[[int, int], None], start: int, stop: int) -> None:
    """One range, marked so that a nested call does not wait for the pool."""
    _worker.busy = True
    try:
        fn(start, stop)
    finally:
        _worker.busy = False


@cache
def _pool(pid: int, count: int) -> ThreadPoolExecutor:
    """The pool; a forked child has none of its parent's threads and makes its own."""
    return ThreadPoolExecutor(count - 1, thread_name_prefix="fedqsn-kernel")


def reading_threads() -> ThreadPoolExecutor:
    """Threads that read ahead of those who compute: two keep a disk busy."""
    return _readers(os.getpid())


@cache
def _readers(pid: int) -> ThreadPoolExecutor:
    """As `_pool`."""
    return ThreadPoolExecutor(2, thread_name_prefix="fedqsn-reader")
