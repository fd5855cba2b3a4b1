"""Fixtures for scripts that call `fedqsn`: an environment for them, and this process in place of theirs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fedqsn_cli.auditing.recovery.attackers.catalogue import TRAININGS
from support.helpers import search_path, with_sources
from support.scripts import Scripts

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which `fedqsn` and `python` are those under test."""
    return os.environ | {
        "PATH": search_path(tmp_path_factory.mktemp("bin")),
        "PYTHONPATH": with_sources(ROOT / "src"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripts]:
    """Runs scripts whose commands run in this process: most of the time of a command is importing torch."""
    with Scripts(tmp_path_factory.mktemp("scripts")) as found:
        yield found


@pytest.fixture
def short_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Audits train two attacks for a few steps at one rate; tests/auditing looks at what all of them find."""
    monkeypatch.setattr("fedqsn_cli.auditing.recovery.attackers.attack.LEAST_STEPS", 4)
    two = tuple(replace(training, rates=training.rates[:1]) for training in TRAININGS[:2])
    monkeypatch.setattr("fedqsn_cli.auditing.recovery.function.TRAININGS", two)
