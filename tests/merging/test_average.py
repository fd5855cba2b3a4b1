"""An average that is made in one go against the sums that take one update after the other: the same bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqsn_cli import merge
from fedqsn_cli.errors import RefusedUpdate
from fedqsn_cli.merging import merge_pass
from fedqsn_cli.merging.average import step_by_average
from fedqsn_cli.merging.sums.average_kernel import MOST_AVERAGED
from fedqsn_cli.merging.updates import adapters
from fedqsn_cli.merging.updates.adapters import UntrainedValues
from fedqsn_cli.merging.updates.stored_values import ReadBytes, ReadValues, UpdateSlice
from support.adapters import draft_adapters
from support.helpers import contents, draft, make_model, noise, nothing_written, read_model
from support.passes import chunks_of, threads_of
from support.scenario import JobFolder, Scenario, few, job_folder, scenarios

PRECISIONS = ("fp32", "bf16", "fp16")


def both_ways(job: JobFolder, folders: list[Path], monkeypatch: pytest.MonkeyPatch, **options: object) -> None:
    """Merge in one go if so many can be, and update after update; compare everything."""
    records = {"key": job.key, "ledger": job.root / "ledger.jsonl", "max_examples": 10**6, **options}
    averaged: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(merge_pass, "step_by_average", lambda *given: averaged.append(1) or step_by_average(*given))
        at_once = merge(str(job.model), folders, job.root / "at-once", **records)
    assert bool(averaged) == (len(folders) <= MOST_AVERAGED)
    with monkeypatch.context() as patch:
        patch.setattr(merge_pass, "is_average", lambda how, clients: False)
        in_turn = merge(str(job.model), folders, job.root / "in-turn", **records)
    assert contents(job.root / "at-once") == contents(job.root / "in-turn")
    assert at_once.covered == in_turn.covered
    for one, other in zip(at_once.clients, in_turn.clients, strict=True):
        assert (one.largest_tensor.tensor, one.largest_unit.unit) == (
            other.largest_tensor.tensor,
            other.largest_unit.unit,
        )
        for field in ("norm", "relative_norm", "cosine", "coverage", "share"):  # sums in another order
            wanted = getattr(other, field)
            assert getattr(one, field) == (wanted if wanted is None else pytest.approx(wanted, rel=1e-9))


@few(30)
@given(
    scenarios(),
    st.lists(st.tuples(st.integers(1, 10**5), st.sampled_from(PRECISIONS)), min_size=1, max_size=4),
    st.sampled_from([1.0, 0.3]),
    st.sampled_from([1e-9, 0.01, 30.0]),
)
def test_both_ways_make_the_same_model(
    scenario: Scenario, sent: list[tuple[int, str]], rate: float, size: float
) -> None:
    names = tuple(f"c{index}" for index in range(len(sent)))
    with job_folder(scenario) as job, pytest.MonkeyPatch.context() as patch:
        proxies = job.export(job.model, "proxies", clients=names)
        folders = [
            draft(proxies / name, noise(index, size), examples=examples, precision=precision).write(job.root / name)
            for index, (name, (examples, precision)) in enumerate(zip(names, sent, strict=True))
        ]
        both_ways(job, folders, patch, server_lr=rate, max_update_norm=1e12, max_unit_norm=1e12)


@pytest.fixture
def job(folder: Path) -> JobFolder:
    """A model with matrices of more than a thousand columns."""
    job = JobFolder(Scenario("llama", "BF16", 64, 2100, 1, "neuron", "none", None, 64, False, "zero", 0.2, 0.3), folder)
    make_model(job.model, "llama", dtype="BF16", hidden=64, inner=2100)
    return job


def updates_of(job: JobFolder, count: int, size: float = 0.01) -> list[Path]:
    names = tuple(f"c{index}" for index in range(count))
    proxies = job.export(job.model, "proxies", clients=names)
    return [
        draft(proxies / name, noise(index, size), examples=3 + index, precision="bf16").write(job.root / name)
        for index, name in enumerate(names)
    ]


@pytest.mark.parametrize("count", [1, MOST_AVERAGED, MOST_AVERAGED + 1])
def test_rows_of_several_pieces(job: JobFolder, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    both_ways(job, updates_of(job, count), monkeypatch)


def test_matrices_that_nobody_trained(job: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    proxies = job.export(job.model, "proxies", clients=("ann", "bob"))
    keep = {"model.layers.0.mlp.up_proj.weight": True}
    folders = [draft_adapters(proxies / name, 1, keep=keep).write(job.root / name) for name in ("ann", "bob")]
    both_ways(job, folders, monkeypatch)
    before, after = read_model(job.model), read_model(job.root / "at-once")
    assert {name for name in before if not np.array_equal(before[name][1], after[name][1])} == keep.keys()


class ReadZeros(UntrainedValues):
    """Zeros that look like those of a full update."""

    read_in_all = 0

    def read(self, part: UpdateSlice, read: ReadBytes) -> ReadValues:
        ReadZeros.read_in_all += 1
        return replace(super().read(part, read), untrained=False)


WAYS: list[dict[str, Any]] = [
    {},
    {"clip_norm": 0.1},
    {"normalize": "clients"},
    {"control": "c9"},
    {"partial": True},
    {"rule": "median", "byzantine": 1},
    {"rule": "krum", "byzantine": 1},
    {"rule": "geometric-median", "byzantine": 1},
    {"server_optimizer": "momentum"},
    {"clip_norm": 0.1, "noise_multiplier": 1.0, "delta": 0.01},
]
MATRICES = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "down")]


@dataclass(frozen=True)
class PartlyTrained:
    """A job whose clients trained adapters: all of them the first of the matrices, every other one both."""

    job: JobFolder
    sent: list[Path]

    def merged(self, name: str, way: dict[str, Any]) -> Any:
        """What they sent, put together in a way; the result of the merge."""
        options = {key: self.job.root / value if key == "control" else value for key, value in way.items()}
        folders = self.sent[:-1] if "control" in options else self.sent
        records = {"key": self.job.key, "ledger": self.job.root / "ledger.jsonl"}
        return merge(str(self.job.model), folders, self.job.root / name, **records, **options)


def partly_trained(folder: Path, axis: str) -> PartlyTrained:
    job = JobFolder(Scenario("llama", "BF16", 64, 128, 1, axis, "none", None, 64, False, "zero", 0.2, 0.3), folder)
    make_model(job.model, "llama", dtype="BF16", hidden=64, inner=128)
    names = tuple(f"c{index}" for index in range(MOST_AVERAGED + 2))
    proxies = job.export(job.model, "proxies", clients=names)
    keeps = [dict.fromkeys(MATRICES[: 1 + number % 2], True) for number in range(len(names))]
    sent = [
        draft_adapters(proxies / name, number, keep=keep).write(job.root / name)
        for number, (name, keep) in enumerate(zip(names, keeps, strict=True))
    ]
    return PartlyTrained(job, sent)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("axis", ["neuron", "input"])
def test_what_nobody_trained_is_left_alone_however_updates_are_put_together(
    folder: Path, axis: str, way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = partly_trained(folder, axis)
    left_alone = made.merged("skipped", way)
    monkeypatch.setattr(adapters, "UntrainedValues", ReadZeros)
    monkeypatch.setattr(ReadZeros, "read_in_all", 0)
    looked_at = made.merged("read", way)
    assert ReadZeros.read_in_all
    assert contents(folder / "skipped") == contents(folder / "read")
    assert replace(left_alone, path="") == replace(looked_at, path="")
    if not way:
        before, after = read_model(made.job.model), read_model(folder / "skipped")
        assert {name for name in before if not np.array_equal(before[name][1], after[name][1])} == set(MATRICES)


@pytest.mark.parametrize("options", [{"clip_norm": 0.1}, {"rule": "multi-krum", "byzantine": 1}])
def test_clipped_and_chosen_updates(
    job: JobFolder, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    both_ways(job, updates_of(job, 5), monkeypatch, **options)


def test_threads_and_chunks_change_nothing(job: JobFolder) -> None:
    folders, found = updates_of(job, 3), []
    for number, (threads, chunk) in enumerate([(1, 1 << 19), (3, 1 << 19), (2, 5000)]):
        with threads_of(threads), chunks_of(chunk):
            result = merge(
                str(job.model), folders, job.root / f"n{number}", key=job.key, ledger=job.root / "ledger.jsonl"
            )
        found.append((contents(job.root / f"n{number}"), [client.norm for client in result.clients]))
    assert found[0] == found[1]
    assert found[0][0] == found[2][0]


def test_a_model_that_would_overflow_is_refused(job: JobFolder) -> None:
    folders = updates_of(job, 2, 1e30)
    with pytest.raises(RefusedUpdate, match="cannot be summed exactly"), nothing_written(job.root / "next"):
        limits = {"max_update_norm": 1e38, "max_unit_norm": 1e38}
        merge(str(job.model), folders, job.root / "next", key=job.key, ledger=job.root / "ledger.jsonl", **limits)
