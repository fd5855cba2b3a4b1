"""The product still makes and prints what the golden corpus holds; and the corpus holds what it says it does."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest

from golden.corpus import (
    MEASURING,
    RECORDED,
    SECTIONS,
    Made,
    as_lines,
    differences,
    faults,
    make_here,
    recorded,
    texts,
)
from golden.inputs import SHAPES
from golden.outputs import FORMATS, grid
from golden.running import steady
from support.forks import fork

TESTS = Path(__file__).parents[1]
LARGEST = 200_000  # bytes of a recorded file
MEANT = "Is that meant? make golden ARGS=--write records it"
QUICK = ("help", "errors", "transcripts", "merges", "outputs")


def compare(*options: str) -> None:
    command = [sys.executable, "-m", "golden.corpus", "--processes", "1", *options]
    paths = os.pathsep.join(map(str, (TESTS.parent / "src", TESTS)))
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{MEANT}"


def compare_here(section: str) -> None:
    """What measures nothing, in this process."""
    with patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):  # read from the environment when it was imported
        made = make_here(section)
    after = texts(made)
    found = faults(made, {name: text for name, text in recorded([section]).items() if name in after})
    assert not found, "\n".join([*found, MEANT])


@pytest.mark.long
@pytest.mark.parametrize("section", QUICK)
def test_what_measures_nothing_is_as_it_was_recorded(section: str) -> None:
    assert fork(partial(compare_here, section)).wait() == 0, "see stderr"


@pytest.mark.soak  # kernels are compiled anew, for any processor
@pytest.mark.parametrize("section", MEASURING)
def test_everything_is_as_it_was_recorded(section: str) -> None:
    compare("--only", section)


def test_every_recorded_file_is_of_a_section_small_and_without_a_place_on_this_machine() -> None:
    assert {path.name for path in RECORDED.iterdir()} == set(SECTIONS)
    for path in RECORDED.rglob("*"):
        if path.is_file():
            assert path.stat().st_size < LARGEST, path
            assert not re.search(r"/dev/shm|/tmp/|fedqsn-golden", path.read_text()), path


PAIRS = [
    ("family", "format"),
    ("family", "axis"),
    ("family", "fill"),
    ("family", "dtype"),
    ("family", "block_size"),
    ("family", "schedule"),
    ("format", "axis"),
    ("format", "fill"),
    ("format", "dtype"),
    ("format", "block_size"),
    ("format", "schedule"),
    ("format", "shards"),
    ("format", "hidden"),
    ("format", "p1"),
    ("axis", "fill"),
    ("axis", "dtype"),
    ("axis", "block_size"),
    ("axis", "schedule"),
    ("axis", "shards"),
    ("axis", "hidden"),
    ("axis", "rescale"),
    ("fill", "dtype"),
    ("fill", "schedule"),
    ("fill", "rescale"),
    ("fill", "p2"),
    ("dtype", "shards"),
    ("dtype", "hidden"),
    ("dtype", "block_size"),
]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_every_two_values_meet_in_the_grid(one: str, other: str) -> None:
    met = {(getattr(case, one), getattr(case, other)) for case in grid()}
    values = [{pair[place] for pair in met} for place in (0, 1)]
    assert met == set(itertools.product(*values))


def test_the_grid_has_every_family_format_and_layout() -> None:
    cases = list(grid())
    assert {(case.family, case.format) for case in cases} == set(itertools.product(SHAPES, FORMATS))
    layouts = {(case.format, case.layout) for case in cases}
    assert layouts >= set(itertools.product(("nf4", "fp4", "int8"), (None, "bnb", "dense")))
    assert {case.axis for case in cases if case.double_quant} >= {"neuron", "element"}


# ------------------------------------------------------------------------------------------------ the corpus itself


def test_a_difference_is_told_line_by_line() -> None:
    before = {"a/x.json": as_lines({"one": "1", "two": "2"}), "a/gone.txt": "text\n", "a/same.txt": "text\n"}
    after = {"a/x.json": as_lines({"one": "1", "two": "3"}), "a/new.txt": "text\n", "a/same.txt": "text\n"}
    told = [line for line in differences(before, after) if not line.startswith(("@@", "---", "+++"))]
    assert told == ["-text", "+text", '-"two": "2"', '+"two": "3"']
    assert list(differences(before, before)) == []
    assert list(differences({"a/x.txt": "text\r\n"}, {"a/x.txt": "text\n"})) == ["a/x.txt: its line ends differ"]


def test_parts_of_one_file_are_put_together_and_never_overwritten() -> None:
    one, two = Made("a", {"a/x.json": {"one": "1"}, "a/y.txt": "text"}, 0), Made("a", {"a/x.json": {"two": "2"}}, 0)
    assert texts([one, two]) == {"a/x.json": '{\n"one": "1",\n"two": "2"\n}\n', "a/y.txt": "text"}
    with pytest.raises(AssertionError):
        texts([one, one])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.1", "0.1"),
        ("0.29166666666666669, -12.345678", "0.291667, -12.3457"),
        ('"x": 1.0577359146e-05}', '"x": 1.05774e-05}'),
        ("bytes 15038, 22,713,216", "bytes 15038, 22,713,216"),
        ("3cc5e5.123456789 v1.2345678", "3cc5e5.123456789 v1.2345678"),
        ("0.9999999999", "1.0"),
    ],
)
def test_floats_are_recorded_with_six_digits(text: str, expected: str) -> None:
    assert steady(text) == expected
