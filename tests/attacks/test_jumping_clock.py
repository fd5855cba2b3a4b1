"""A clock that jumps, backwards too: nothing is ordered or timed by it, and no output holds it."""

from __future__ import annotations

import ast
import itertools
import shutil
import time
from pathlib import Path

import pytest

from attacks.killing import Trial
from fedqsn_cli.cli import app
from support.attacks import World, make_world
from support.helpers import contents
from support.processes import run

SOURCES = Path(app.__file__).parents[1]
ASKS_FOR_THE_DATE = {
    "auditing/run.py",  # which waivers have expired
    "courier/kits.py",  # whether certificates are valid
    "courier/work.py",  # the log of a site
}


CLOCKS = {"time.time", "time.time_ns", "time.localtime", "time.gmtime", "time.ctime", "time.strftime"}
CLOCKS |= {f"{owner}.{name}" for owner in ("datetime", "date") for name in ("now", "utcnow", "today")}


def reads_the_clock(source: str) -> bool:
    """Whether a module asks what time it is; `time.monotonic` does not."""
    names = [ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    return "from time import" in source or any(".".join(name.split(".")[-2:]) in CLOCKS for name in names)


def test_only_waivers_and_a_log_ask_what_time_it_is() -> None:
    asking = {path for path in SOURCES.rglob("*.py") if reads_the_clock(path.read_text())}
    assert {str(path.relative_to(SOURCES)) for path in asking} == ASKS_FOR_THE_DATE


def played(world: World, here: Path) -> list[dict[str, bytes]]:
    """All files after each of three commands."""
    ends = []
    for name in ("export-proxy", "client-train --save-every", "merge"):
        trial = Trial(world, name)
        trial.fresh(here)
        assert run(*trial.words(here)).code == 0
        ends.append(contents(here))
        shutil.rmtree(here)
    return ends


def test_commands_end_the_same_while_the_clock_goes_backwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, hours = make_world(tmp_path / "world"), itertools.count(1)
    usual = played(world, tmp_path / "here")

    monkeypatch.setattr(time, "time", lambda: 1e9 - 3600 * next(hours))
    monkeypatch.setattr(time, "time_ns", lambda: int(1e18) - 3600 * 10**9 * next(hours))

    assert played(world, tmp_path / "here") == usual
