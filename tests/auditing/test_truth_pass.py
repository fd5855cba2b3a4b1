"""The truth is read once, whatever looks at it, and a search ends when it is asked to."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from fedqsn_cli import audit
from fedqsn_cli.auditing import digests
from fedqsn_cli.auditing.findings import Audit
from fedqsn_cli.auditing.invariants.weak_seeds import longest_runs
from fedqsn_cli.checkpoint import Checkpoint
from fedqsn_cli.checkpoint.descriptors import StoredFile
from support.leaks import AuditedJob, make_job, tamper

JOBS: dict[str, dict[str, Any]] = {
    "packed": {},
    "turned": {"family": "gpt2", "model": {"dtype": "bfloat16"}},
    "single weights": {"family": "electra", "axis": "element", "format": "nf2"},
    "expert stacks": {"family": "gpt_oss", "format": "nf3"},
}


@pytest.fixture(params=JOBS.values(), ids=JOBS.keys())
def job(request: pytest.FixtureRequest, tmp_path: Path) -> AuditedJob:
    return make_job(tmp_path / "job", **request.param)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Bytes that were read of each tensor of a folder called truth, in runs of rows."""
    counts: dict[str, int] = {}
    as_it_is = Checkpoint.read_fresh

    def counted(self: Checkpoint, name: str, start: int, count: int) -> Any:
        if self.path.name == "truth":
            counts[name] = counts.get(name, 0) + count
        return as_it_is(self, name, start, count)

    monkeypatch.setattr(Checkpoint, "read_fresh", counted)
    yield counts


def audited(job: AuditedJob, **left_out: None) -> Audit:
    given: dict[str, Any] = {"truth": job.truth, "key": job.key, "ledger": job.ledger} | left_out
    return audit([job.proxy(client) for client in job.clients], **given)


def test_every_weight_of_the_truth_is_read_once(job: AuditedJob, read: dict[str, int]) -> None:
    assert audited(job).verdict == "passed"
    with Checkpoint.open(job.truth) as truth:
        assert read == {name: entry.nbytes for name, entry in truth.entries.items()}


def test_no_file_of_a_proxy_that_is_made_again_is_read_once_more_for_its_digest(
    job: AuditedJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    as_it_is = digests.file_digest

    def noted(path: Path) -> str:
        hashed.append(path.name)
        return as_it_is(path)

    monkeypatch.setattr(digests, "file_digest", noted)
    assert audited(job).verdict == "passed" and not hashed
    audited(job, ledger=None)
    assert "model.safetensors" in hashed


def test_weights_of_one_proxy_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the attacks, and by the comparison with what an export writes, which takes what was read for them."""
    job, read = make_job(tmp_path / "job", clients=["alice"]), list[tuple[int, int]]()
    as_it_is = StoredFile._read

    def noted(self: StoredFile, start: int, count: int) -> Any:
        read.extend([(start, count)] if self.path == job.proxy() / "model.safetensors" else [])
        return as_it_is(self, start, count)

    monkeypatch.setattr(StoredFile, "_read", noted)
    assert audited(job).verdict == "passed"
    ends = [0, *(start + count for start, count in sorted(read))]
    assert ends == [*(start for start, _ in sorted(read)), (job.proxy() / "model.safetensors").stat().st_size]


def test_recovery_is_the_same_whether_the_release_is_made_again_or_not(job: AuditedJob) -> None:
    with_release, without = audited(job), audited(job, ledger=None)
    assert with_release.recovery == without.recovery
    assert with_release.recovery == audited(job).recovery  # and whatever the threads did


def test_a_proxy_that_cannot_be_measured_does_not_keep_another_from_being_made_again(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", format="nf3")
    norm = "bert.embeddings.LayerNorm.bias"
    tamper(job, lambda tensors: tensors.update({norm: tensors[norm][:3]}))
    found = audited(job)
    assert {(one.scope, one.status) for one in found.checked if one.rule == "FQ012"} == {
        ("proxy alice", "fail"),
        ("proxy bob", "pass"),
    }
    assert {one.scope for one in found.findings if one.rule == "FQ903"} >= {"proxy alice", "proxy bob"}


class Stopped(Exception):
    """The clock of a test ran out."""


def test_a_search_for_weak_seeds_ends_when_it_is_asked_to() -> None:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped

    hidden = np.random.default_rng(0).random((1, 1 << 14)) < 0.5
    longest_runs(hidden[:, :64], seeds=256)  # compiled
    before = signal.signal(signal.SIGPROF, stop)
    try:
        start = time.process_time()
        with pytest.raises(Stopped):
            signal.setitimer(signal.ITIMER_PROF, 0.05)
            longest_runs(hidden)
        assert time.process_time() - start < 3  # all seeds take ten times as long
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
