"""Fixtures for all tests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from worlds import MEMORY


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
