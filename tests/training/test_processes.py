"""Several processes train as one process does with a batch that is so many times larger."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedqsn_cli import client_train
from fedqsn_cli.training.processes import ALONE, Processes, launched, own_device
from support.processes import environment
from support.training_jobs import labelled, make_proxy, small_model

EXACT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def test_two_processes_take_the_steps_of_one_with_twice_the_batch(tmp_path: Path) -> None:
    proxy = make_proxy(small_model(tmp_path / "model", **EXACT), tmp_path / "proxy")
    data = labelled(tmp_path / "data.jsonl", rows=25)  # the last batch has one row: none for the second process
    usual = f"--data {data} --eval-data {data} --device cpu --precision fp32 --epochs 2 --lr 1e-3".split()
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
        "-m",
        "fedqsn_cli",
    ]
    two = ["client-train", str(proxy), "--out", "two", "--batch-size", "4", "--log", "two.jsonl", "--save-every", "3"]
    done = subprocess.run(
        [sys.executable, *launch, *two, *usual],
        cwd=tmp_path,
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("update  ") == 1
    assert done.stderr.count("fedqsn: training") == 1
    one = client_train(
        proxy,
        tmp_path / "one",
        data=data,
        eval_data=data,
        device="cpu",
        precision="fp32",
        epochs=2,
        lr=1e-3,
        batch_size=8,
        log=tmp_path / "one.jsonl",
    )
    assert one.steps == 8
    assert losses(tmp_path / "two.jsonl") == pytest.approx(losses(tmp_path / "one.jsonl"), abs=1e-5)
    ours, theirs = (load_file(tmp_path / name / "update.safetensors") for name in ("two", "one"))
    for name, values in theirs.items():
        torch.testing.assert_close(ours[name], values, rtol=1e-2, atol=2e-5)  # AdamW's first steps are of size lr
    assert sorted(path.name for path in tmp_path.glob(".two*")) == []


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
