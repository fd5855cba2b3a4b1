"""Every command, killed at random instants: the old state or the new one, and the same end by running it again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from attacks.killing import COMMANDS, kills
from support.attacks import make_world
from support.helpers import with_sources
from support.processes import SOURCES, environment


def kill(*words: str) -> list[dict[str, object]]:
    """What `attacks.killing` counts, in a process of its own."""
    command = [sys.executable, "-m", "attacks.killing", *words]
    surroundings = environment(OMP_NUM_THREADS="1", PYTHONPATH=with_sources(SOURCES, Path(__file__).parents[1]))
    ended = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=7000)
    assert ended.returncode == 0, ended.stderr
    print(ended.stdout)
    return [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("name", ["export-proxy", "merge"])
def test_a_command_that_was_killed_ends_as_if_it_had_not_been(name: str, tmp_path: Path) -> None:
    assert kills(name, make_world(tmp_path / "world"), tmp_path, count=3, seed=1).total() == 3


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", COMMANDS)
def test_two_hundred_kills_of_every_command(name: str) -> None:
    (found,) = kill(name, "--kills", "200")
    assert found["kills"] == 200
