"""Jobs whose key is known, so that their masks are the same in every run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from fedqsn_cli.masks import job_key


@contextmanager
def known_key(number: int = 0) -> Iterator[None]:
    """The job that is begun in this block has this key; jobs of other numbers have others."""
    secret = hashlib.sha256(f"key {number} of the tests".encode()).digest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_key, "secrets", SimpleNamespace(token_bytes=lambda size: secret[:size]))
        yield
