"""How much a pass over a model reads at a time, and in how many threads: nothing that is written depends on either."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from fedqsn_cli.export import pipeline, proxy, server_model
from fedqsn_cli.kernels import threads
from fedqsn_cli.merging.ending import restore
from fedqsn_cli.merging.step import chunks
from fedqsn_cli.models import residual


@contextmanager
def chunks_of(elements: int) -> Iterator[None]:
    """Let every pass over a model read so many elements at a time.

    Constants are patched: no user should choose them, and a parameter would go through every command for tests alone.
    `tests/invariants/test_i4_determinism.py` holds that they are reached.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module in (proxy, server_model):
            patch.setattr(module, "run", partial(pipeline.run, chunk_elements=elements))
        patch.setattr(restore, "CHUNK_ELEMENTS", elements)
        patch.setattr(residual, "CHUNK", elements)
        patch.setattr(chunks, "CHUNK_ELEMENTS", elements)
        yield


@contextmanager
def threads_of(count: int) -> Iterator[None]:
    """Let kernels compute in so many threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDQSN_THREADS", str(count))
        _forget_threads()
        yield
    _forget_threads()


def _forget_threads() -> None:
    threads.thread_count.cache_clear()
    threads._pool.cache_clear()
