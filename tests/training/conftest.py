"""Fixtures for tests that need several processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.warm_processes import WarmServer


@pytest.fixture(scope="session")
def warm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmServer]:
    """Starts processes that have imported everything."""
    with WarmServer(tmp_path_factory.mktemp("warm")) as server:
        yield server
