"""export-proxy --budget: what would show too much is refused before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedqsn_cli import export_proxy
from fedqsn_cli.artifacts import ledger
from fedqsn_cli.errors import FormatError, GateFailed, InputError
from fedqsn_cli.exposure.budget import Budget, Planned
from fedqsn_cli.exposure.exposure import exposure
from fedqsn_cli.masks import job_key
from support.helpers import make_model
from support.keys import known_key
from support.ledgers import Line

OPTIONS: dict[str, Any] = {"p1": 0.25, "p2": 0.25, "format": "nf3"}


@pytest.fixture(autouse=True)
def the_same_masks_in_every_run() -> Iterator[None]:
    """With some keys two clients have seen hardly more than one."""
    with known_key():
        yield


@pytest.fixture
def job(folder: Path) -> Path:
    """A job whose clients ann and bob got one proxy each."""
    make_model(folder / "global", "bert", hidden=64, inner=128)
    export(folder, "ann", 1)
    export(folder, "bob", 1)
    return folder


def export(folder: Path, client: str, round: int, **options: Any) -> Path:
    out = folder / f"{client}-{round}"
    export_proxy(
        str(folder / "global"),
        out,
        client=[client],
        round=round,
        key=folder / "job.key",
        ledger=folder / "ledger.jsonl",
        **{**OPTIONS, **options},
    )
    return out


def after(folder: Path, *more: Line) -> float:
    """What ann will have seen."""
    lines = [*ledger.read(folder / "ledger.jsonl"), *more]
    found = exposure(job_key.load(folder / "job.key"), lines)
    return next(client.shares[-1] for client in found.clients if client.client == "ann")


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_release_within_the_budget_is_made_and_one_beyond_is_not(job: Path) -> None:
    share = after(job, Line("ann", 2, "fresh", 0.25))
    before = everything(job)
    with pytest.raises(GateFailed, match=r"--budget: client ann would have seen .*nothing was written"):
        export(job, "ann", 2, budget=share - 0.001)
    assert everything(job) == before
    export(job, "ann", 2, budget=share)
    assert after(job) == pytest.approx(share)


def test_a_refused_release_ends_with_exit_code_1() -> None:
    assert GateFailed.exit_code == 1


def test_a_new_job_is_refused_before_its_key_is_written(folder: Path) -> None:
    make_model(folder / "global", "bert", hidden=64, inner=128)
    before = everything(folder)
    with pytest.raises(GateFailed):
        export(folder, "ann", 1, budget=0.1)
    assert everything(folder) == before


def test_coalitions_count_all_clients_of_the_ledger(job: Path) -> None:
    alone = after(job, Line("ann", 2, "fresh", 0.25))
    export(job, "ann", 2, budget=alone + 0.001, coalition=1)
    with pytest.raises(GateFailed, match=r"2 clients together \(ann, bob\) would have seen"):
        export(job, "ann", 3, budget=after(job, Line("ann", 3, "fresh", 0.25)) + 0.001, coalition=2)


def test_a_client_over_the_budget_does_not_stop_others(job: Path) -> None:
    for number in (2, 3, 4):
        export(job, "ann", number)
    export(job, "bob", 2, budget=after(job) - 0.005)


def test_the_same_release_again_shows_nothing_new(job: Path) -> None:
    share = after(job)
    with pytest.raises(GateFailed):
        export(job, "ann", 2, budget=share)
    export(job, "ann", 1, budget=share, force=True)


def test_a_sticky_client_stays_within_its_budget_for_ever(folder: Path) -> None:
    make_model(folder / "global", "bert", hidden=64, inner=128)
    export(folder, "ann", 1, schedule="sticky")
    for number in (2, 3):
        export(folder, "ann", number, schedule="sticky", budget=after(folder))


def test_releases_made_meanwhile_are_seen_under_the_ledgers_lock(job: Path) -> None:
    """Two exports at the same time: both fit alone, the second to be recorded does not."""
    mine = job_key.load(job / "job.key")
    limit = Budget(mine, (Planned("ann", 3, "fresh", 0.25),), after(job, Line("ann", 3, "fresh", 0.25)) + 1e-6, None)
    limit.check(ledger.read(job / "ledger.jsonl"))
    export(job, "ann", 2)
    before = (job / "ledger.jsonl").read_bytes()
    (release,) = [one for one in ledger.read(job / "ledger.jsonl") if one.client == "bob"]
    with pytest.raises(GateFailed):
        ledger.record(job / "ledger.jsonl", mine, [release], check=limit.check)
    assert (job / "ledger.jsonl").read_bytes() == before


def test_a_damaged_ledger_is_not_an_empty_one(job: Path) -> None:
    path = job / "ledger.jsonl"
    path.write_bytes(path.read_bytes().split(b"\n", 1)[1])
    with pytest.raises(FormatError, match="chain"):
        export(job, "ann", 2, budget=1.0)


@pytest.mark.parametrize(
    ("budget", "coalition", "where"),
    [(1.5, None, "--budget"), (float("nan"), None, "--budget"), (0.5, 0, "--coalition"), (None, 2, "--coalition")],
)
def test_invalid_limits_are_refused(job: Path, budget: float | None, coalition: int | None, where: str) -> None:
    with pytest.raises(InputError) as caught:
        export(job, "ann", 2, budget=budget, coalition=coalition)
    assert caught.value.where == where
