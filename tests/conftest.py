"""Fixtures for all tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.scenario import MEMORY

if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests run beside each other, one for a core: torch's threads would wait for each other (before torch is imported).
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty directory, in memory where there is such a place: fsync costs nothing there."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def module_folder() -> Iterator[Path]:
    """The same for all tests of a module."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        yield Path(name)
