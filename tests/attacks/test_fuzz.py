"""A short run of the fuzzer, and every input again that a command once failed on."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path

import pytest

from attacks.fuzz import CORPUS, ENTRIES, fuzz, outcome, prepared
from support.attacks import World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return prepared(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*.json")), ids=lambda path: path.stem)
def test_an_input_that_was_found_ends_well(path: Path, world: World) -> None:
    case = json.loads(path.read_text())
    entry = next(entry for entry in ENTRIES if entry.key == case["entry"])
    ended, kind = outcome(entry, world, base64.b64decode(case["data"]))
    assert kind is None, (ended, kind)


def test_damage_anywhere_ends_well(world: World, tmp_path: Path) -> None:
    counts, kinds = fuzz(world, ENTRIES, random.Random(1), save=tmp_path / "faults")
    assert not kinds, [path.read_text()[:2000] for path in (tmp_path / "faults").iterdir()]
    assert sum(counts.values()) > 10
    assert {name for name, _ in counts} == {entry.name for entry in ENTRIES}
    assert {ended for _, ended in counts} <= {"accepted", "refused", "exit 1", "exit 3", "exit 4"}
