"""Several processes train as one process does with a batch that is so many times larger."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedqsn_cli import client_train
from fedqsn_cli.training.steps.processes import ALONE, Processes, launched, own_device
from support.forks import fork_command
from support.processes import environment, free_port
from support.training_jobs import labelled, make_proxy, small_model

EXACT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


METHODS = {"full": "update.safetensors", "lora": "adapter_model.safetensors"}  # and the file of what was trained


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    """Each method of training."""
    return str(request.param)


@pytest.fixture
def job(tmp_path: Path, method: str) -> Path:
    """A folder with a proxy, data.jsonl, and the update and the log of one process with batches of 8."""
    proxy = make_proxy(small_model(tmp_path / "model", **EXACT), tmp_path / "proxy")
    data = labelled(tmp_path / "data.jsonl", rows=25)  # the last batch has one row: none for the second process
    given: dict[str, Any] = {"device": "cpu", "precision": "fp32", "epochs": 2, "lr": 1e-3, "batch_size": 8}
    given["method"] = method
    one = client_train(proxy, tmp_path / "one", data=data, eval_data=data, log=tmp_path / "one.jsonl", **given)
    assert one.steps == 8
    return tmp_path


WORDS = shlex.split(
    "client-train proxy --out two --data data.jsonl --eval-data data.jsonl --device cpu --precision fp32 --epochs 2 "
    "--lr 1e-3 --batch-size 4 --log two.jsonl --save-every 3"
)


def check(job: Path, method: str, printed: str) -> None:
    """Two processes have done what one did, and one of them has said so."""
    assert printed.count("update  ") == 1
    assert printed.count("fedqsn: training") == 1
    assert losses(job / "two.jsonl") == pytest.approx(losses(job / "one.jsonl"), abs=1e-5)
    ours, theirs = (load_file(job / name / METHODS[method]) for name in ("two", "one"))
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        torch.testing.assert_close(ours[name], values, rtol=1e-2, atol=2e-5)  # AdamW's first steps are of size lr
    assert sorted(path.name for path in job.glob(".two*")) == []


def test_two_processes_take_the_steps_of_one_with_twice_the_batch(job: Path, method: str) -> None:
    codes, printed = two_processes(job, [*WORDS, "--method", method])
    assert codes == [0, 0], printed
    check(job, method, printed)


def two_processes(folder: Path, words: list[str]) -> tuple[list[int], str]:
    """The exit codes of two processes, and what they print; only the first of them can reach the data."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with (folder / "printed").open("w") as printed:
        both = [
            fork_command(*given, told=printed, folder=folder, RANK=str(rank), LOCAL_RANK=str(rank), **common)
            for rank, given in enumerate((words, [word.replace("data.jsonl", "nowhere.jsonl") for word in words]))
        ]
        codes = [child.wait() for child in both]
    return codes, (folder / "printed").read_text()


def test_data_that_the_first_process_cannot_use_ends_all_of_them(tmp_path: Path) -> None:
    make_proxy(small_model(tmp_path / "model", **EXACT), tmp_path / "proxy")
    (tmp_path / "data.jsonl").write_text('{"text": "w5", "label": 0}\n{"text": "w6", "label": "unknown"}\n')
    codes, printed = two_processes(tmp_path, WORDS)
    assert codes == [2, 2]
    assert printed.count("data.jsonl: row 2: column 'label'") == 2


@pytest.mark.soak
def test_accelerate_launches_them(job: Path, method: str) -> None:
    launch = shlex.split("accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port 0 -m fedqsn_cli")
    done = subprocess.run(
        [sys.executable, "-m", *launch, *WORDS, "--method", method],
        cwd=job,
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    check(job, method, done.stdout + done.stderr)


def losses(log: Path) -> list[float]:
    """The loss of each step."""
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()]


def test_every_row_of_a_batch_has_one_process() -> None:
    rows = [5, 3, 8, 1, 9]
    shares = [Processes(rank, 3).share(rows) for rank in range(3)]
    assert shares == [[5, 1], [3, 9], [8]]
    assert ALONE.share(rows) == rows


def test_one_process_has_nothing_to_agree_on() -> None:
    leaf = torch.ones(3)
    ALONE.sum_gradients([leaf])
    assert leaf.grad is None
    assert ALONE.sums(2, 0.5) == [2, 0.5]
    assert ALONE.every(leaf) == [leaf]


def test_the_environment_tells_who_a_process_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert launched() == ALONE
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert launched() == Processes(3, 4)
    assert not launched().is_first
    assert own_device(torch.device("cpu")) == torch.device("cpu")
    assert own_device(torch.device("cuda")) == torch.device("cuda:1")
    assert own_device(torch.device("cuda:0")) == torch.device("cuda:0")
