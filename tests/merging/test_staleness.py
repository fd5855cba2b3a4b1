"""merge --staleness-discount: updates of earlier rounds count less, and are differences of their own round's proxy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedqsn_cli import mask, merge
from fedqsn_cli.errors import InputError, RefusedUpdate
from fedqsn_cli.options import MergeOptions
from merging.test_merge import fedavg, whole_update
from support.helpers import contents, draft, make_model, noise, nothing_written, read_model, to_floats
from support.scenario import JobFolder, Scenario

CLIENTS = {1: "ann", 2: "bob", 3: "cat"}
"""Who answers in which round; dan answers in the third one, too."""


def scenario(axis: str) -> Scenario:
    return Scenario("bert", "F32", 33, 48, 1, axis, "nf4", None, 64, False, "zero", 0.3, 0.2)


def play(folder: Path, axis: str = "neuron") -> JobFolder:
    """Three rounds, of which each has moved the model; the updates of ann and bob come too late for theirs."""
    job = JobFolder(scenario(axis), folder)
    make_model(job.root / "model", "bert", hidden=33)
    for number, late in CLIENTS.items():
        proxies = job.export(model_of(job, number), f"round-{number}", clients=(late, "dan"), round=number)
        for name in (late, "dan"):
            draft(proxies / name, noise(number + len(name), 0.01), examples=10 * number).write(
                job.root / f"u{number}-{name}"
            )
        if number < 3:
            merged(job, f"u{number}-dan", into=number, out=f"model-{number + 1}")
    return job


def model_of(job: JobFolder, number: int) -> Path:
    return job.root / ("model" if number == 1 else f"model-{number}")


def merged(job: JobFolder, *names: str, into: int = 3, out: str = "next", **options: Any) -> Any:
    usual = {"key": job.key, "ledger": job.root / "ledger.jsonl"}
    return merge(str(model_of(job, into)), [job.root / name for name in names], job.root / out, **usual | options)


@pytest.fixture(scope="module")
def original(module_folder: Path) -> JobFolder:
    return play(module_folder / "original")


@pytest.fixture
def job(original: JobFolder, folder: Path) -> JobFolder:
    return original.copied(folder / "job")


LATE = ("u1-ann", "u2-bob", "u3-cat", "u3-dan")


@pytest.mark.parametrize("axis", ["neuron", "input", "element"])
@pytest.mark.parametrize("normalize", ["coverage", "clients"])
def test_late_updates_count_less_by_the_formula_and_keep_the_masks_of_their_round(
    folder: Path, axis: str, normalize: str
) -> None:
    job = play(folder / "job", axis)
    result = merged(job, *LATE, staleness_discount=0.5, normalize=normalize)
    wanted_weights = [10 * 3**-0.5, 20 * 2**-0.5, 30, 30]
    shares = [client.share for client in result.clients]
    assert shares == pytest.approx([weight / sum(wanted_weights) for weight in wanted_weights], rel=1e-6)
    assert [client.verdict for client in result.clients] == [
        "merged, 2 rounds late",
        "merged, 1 round late",
        "merged",
        "merged",
    ]
    parts = [
        whole_update(
            proxy := job.root / f"round-{name[1]}/{name[3:]}",
            draft(proxy, noise(int(name[1]) + 3, 0.01), examples=10 * int(name[1])),
        )
        for name in LATE
    ]
    before, after = read_model(model_of(job, 3)), read_model(job.root / "next")
    for name in parts[0]:
        old = to_floats(before[name][1], "F32").astype(np.float64)
        wanted = fedavg(old, [part[name] for part in parts], wanted_weights, normalize, 1.0)
        np.testing.assert_allclose(to_floats(after[name][1], "F32"), wanted, rtol=2e-6, atol=1e-8)


def test_without_the_option_they_are_refused(job: JobFolder) -> None:
    with nothing_written(job.root), pytest.raises(RefusedUpdate, match="trained on another model"):
        merged(job, *LATE)
    result = merged(job, *LATE, on_refused="skip")
    assert [client.client for client in result.clients] == ["cat", "dan"]


def test_updates_that_are_on_time_count_as_ever(job: JobFolder) -> None:
    merged(job, "u3-cat", "u3-dan", out="plain")
    merged(job, "u3-cat", "u3-dan", out="discounted", staleness_discount=2.0)
    assert contents(job.root / "plain") == contents(job.root / "discounted")


def test_order_and_grouping_change_no_byte(job: JobFolder) -> None:
    merged(job, *LATE, out="first", staleness_discount=0.7, clip_norm=0.5)
    merged(job, "u3-cat", "u3-dan", out="sum", partial=True, clip_norm=0.5)
    merged(job, "u2-bob", "sum", "u1-ann", out="second", staleness_discount=0.7, clip_norm=0.5)
    merged(job, *LATE[::-1], out="third", staleness_discount=0.7, clip_norm=0.5, on_refused="skip")
    assert contents(job.root / "first") == contents(job.root / "second") == contents(job.root / "third")


@pytest.mark.parametrize(
    ("names", "into", "reason"),
    [
        (("u1-ann", "u2-bob"), 3, "proxies of another model"),  # none is on time
        (("u3-cat", "u2-bob"), 2, "proxies of another model"),  # one is of a later round
    ],
)
@pytest.mark.parametrize("skip", [False, True])
def test_what_stays_refused(job: JobFolder, names: tuple[str, ...], into: int, reason: str, skip: bool) -> None:
    options = {"on_refused": "skip"} if skip else {}
    with nothing_written(job.root), pytest.raises(RefusedUpdate, match=f"{reason}|0 of 2|earlier model"):
        merged(job, *names, into=into, staleness_discount=1.0, **options)


def test_a_second_model_of_the_same_round_is_never_late(job: JobFolder) -> None:
    proxies = job.export(model_of(job, 2), "again", clients=("eve",), round=3)
    draft(proxies / "eve", noise(5, 0.01)).write(job.root / "u3-eve")
    with nothing_written(job.root), pytest.raises(RefusedUpdate, match="it was trained on another model"):
        merged(job, "u3-cat", "u3-eve", staleness_discount=1.0)


@pytest.mark.parametrize("first", [("u1-dan",), ("u1-dan", "u1-ann"), ("sum",)])
def test_an_update_that_was_merged_is_not_merged_again(folder: Path, first: tuple[str, ...]) -> None:
    job = JobFolder(scenario("neuron"), folder / "job")
    make_model(job.root / "model", "bert", hidden=33)
    for number in (1, 2, 3):
        proxies = job.export(model_of(job, number), f"round-{number}", clients=("ann", "dan"), round=number)
        for name in ("ann", "dan"):
            draft(proxies / name, noise(number, 0.01)).write(job.root / f"u{number}-{name}")
        if number == 1:
            merged(job, "u1-dan", into=1, out="sum", partial=True)
        if number < 3:
            merged(job, *(first if number == 1 else ["u2-dan"]), into=number, out=f"model-{number + 1}")
    with nothing_written(job.root), pytest.raises(RefusedUpdate, match="'dan' for round 1 is in this model already"):
        merged(job, "u1-dan", "u3-ann", staleness_discount=1.0)
    result = merged(job, "u1-dan", "u2-ann", "u3-dan", staleness_discount=1.0, on_refused="skip", out="both")
    assert [client.client for client in result.clients] == ["ann", "dan"]
    assert [refused.client for refused in result.refused] == ["dan"]
    with nothing_written(job.root), pytest.raises(RefusedUpdate, match="'ann' sent more than one update"):
        merged(job, "u2-ann", "u3-ann", "u3-dan", staleness_discount=1.0)


def test_an_update_that_a_rule_left_out_may_come_again(folder: Path) -> None:
    job = JobFolder(scenario("neuron"), folder / "job")
    make_model(job.root / "model", "bert", hidden=33)
    names = ("ann", "bob", "cat")
    for number in (1, 2):
        proxies = job.export(model_of(job, number), f"round-{number}", clients=names, round=number)
        for name in names:
            draft(proxies / name, noise(number + len(name), 0.01)).write(job.root / f"u{number}-{name}")
        if number == 1:
            done = merged(job, *(f"u1-{name}" for name in names), into=1, out="model-2", rule="krum", byzantine=0)
    left = [client.client for client in done.clients if client.verdict == "left out"]
    chosen = next(name for name in names if name not in left)
    assert len(left) == 2
    merged(job, f"u1-{left[0]}", f"u2-{chosen}", into=2, staleness_discount=1.0)
    with pytest.raises(RefusedUpdate, match="in this model already"):
        merged(job, f"u1-{chosen}", f"u2-{left[0]}", into=2, out="again", staleness_discount=1.0)


def test_what_was_merged_is_known_after_a_mask_and_after_a_restore(job: JobFolder) -> None:
    def known(folder: str) -> Any:
        return json.loads((job.root / folder / "fedqsn.json").read_bytes()).get("merged")

    dan = [json.loads((job.root / f"u{number}-dan/update.json").read_bytes())["proxy_id"][:16] for number in (1, 2)]
    assert known("model-3") == sorted(dan)
    mask(str(job.root / "model-3"), job.root / "server", key=job.key)
    assert known("server") == sorted(dan)
    merge(str(job.root / "model-2"), [], job.root / "whole", key=job.key, restore=job.root / "server")
    assert known("whole") == sorted(dan)
    assert known("model-2") == dan[:1]


def test_a_control_must_be_on_time(job: JobFolder) -> None:
    with nothing_written(job.root), pytest.raises(RefusedUpdate, match="the control was trained on another model"):
        merged(job, "u2-bob", "u3-cat", control=job.root / "u1-dan", staleness_discount=1.0)
    assert merged(job, "u2-bob", "u3-cat", control=job.root / "u3-dan", staleness_discount=1.0).control


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "median", "byzantine": 0},
        {"clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 0.1},
        {"keep_adapter": "adapter"},
        {"partial": True},
        {"restore": "server"},
        {"staleness_discount": 0.0},
    ],
)
def test_what_it_does_not_go_with(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        MergeOptions("next", key="key", ledger="ledger", **{"staleness_discount": 0.5, **options})
