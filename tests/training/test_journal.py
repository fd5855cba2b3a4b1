"""What is written down of every step."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from fedqsn_cli.errors import InputError
from fedqsn_cli.training.steps.journal import StepFigures, TensorBoard, journals


def figures(step: int) -> StepFigures:
    return StepFigures(step, 2.0 / step, 1e-3, 0.5, 40, 400.0, step / 10, 1 << 30)


def write(path: Path, done: int, steps: range) -> None:
    """A run that begins after some steps and makes others."""
    with journals(path, None) as found:
        for journal in found:
            journal.begin(done)
            for step in steps:
                journal.add(figures(step))


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_line_has_all_figures_of_its_step(tmp_path: Path) -> None:
    write(tmp_path / "log", 0, range(1, 2))
    assert json.loads((tmp_path / "log").read_text()) == {
        "step": 1,
        "loss": 2.0,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens": 40,
        "tokens_per_s": 400.0,
        "seconds": 0.1,
        "memory_bytes": 1 << 30,
    }


def test_who_goes_on_repeats_no_step_and_loses_none(tmp_path: Path) -> None:
    log = tmp_path / "log"
    write(log, 0, range(1, 8))
    with log.open("a") as file:
        file.write('{"step": 8, "lo')  # a kill
    write(log, 5, range(6, 10))
    assert steps(log) == list(range(1, 10))


def test_a_new_training_begins_a_new_log(tmp_path: Path) -> None:
    write(tmp_path / "log", 0, range(1, 8))
    write(tmp_path / "log", 0, range(1, 3))
    assert steps(tmp_path / "log") == [1, 2]


@pytest.mark.parametrize("content", [b"some notes\n", b'{"text": "data"}\n', b"[1]\n", b"\xff\n"])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "notes").write_bytes(content)
    with pytest.raises(InputError, match="is not a log of client-train"):
        write(tmp_path / "notes", 0, range(1, 3))
    assert (tmp_path / "notes").read_bytes() == content


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: there is no such folder"):
        write(tmp_path / "nowhere" / "log", 0, range(1, 3))


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with journals(None, tmp_path / "board") as found:
        for journal in found:
            journal.begin(0)
            for step in (1, 2):
                journal.add(figures(step))
    read = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [(1, 2.0), (2, 1.0)]
    assert set(read.Tags()["scalars"]) >= {"train/lr", "train/grad_norm", "train/tokens_per_s", "train/memory_bytes"}


def test_a_missing_tensorboard_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"not installed; pip install 'fedqsn-cli\[tensorboard\]'"):
        TensorBoard(tmp_path)


@pytest.mark.parametrize("length", [1 << 17, 64 << 30])
def test_a_file_of_nothing_but_holes_is_no_log_and_is_not_read_to_its_end(tmp_path: Path, length: int) -> None:
    log = tmp_path / "log"
    log.touch()
    os.truncate(log, length)
    with pytest.raises(InputError, match="is not a log of client-train"):
        write(log, 0, range(1, 2))
    assert log.stat().st_size == length
