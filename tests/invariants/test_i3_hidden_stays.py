"""I3, hidden stays: merge leaves hidden units, and units that nobody saw, bit-equal. I11 guards the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqsn_cli import mask, merge
from support.helpers import hidden_elements, make_model, noise, read_file, read_model, send, visible_elements
from support.scenario import KINDS, JobFolder, Scenario, few, job_folder, scenarios


def seen_by(proxies: list[Path]) -> dict[str, np.ndarray]:
    """Elements of masked tensors that at least one proxy shows."""
    shown = [visible_elements(proxy) for proxy in proxies]
    return {name: np.logical_or.reduce([proxy[name] for proxy in shown]) for name in shown[0]}


def check_unseen(before: Path, after: Path, seen: dict[str, np.ndarray]) -> None:
    """Unseen elements keep their bits; seen ones of an fp32 model moved."""
    old, new = read_model(before), read_model(after)
    assert old.keys() == new.keys()
    for name, flags in seen.items():
        was, now = old[name][1].reshape(flags.shape), new[name][1].reshape(flags.shape)
        np.testing.assert_array_equal(was[~flags], now[~flags])
        if old[name][0] == "F32":
            assert np.count_nonzero(was[flags] != now[flags]) > 0.9 * flags.sum()


@few(40)
@given(scenarios(), st.sampled_from(KINDS), st.sampled_from(["coverage", "clients"]))
def test_i3_hidden_and_unseen_units_keep_their_bits(scenario: Scenario, kind: str, normalize: str) -> None:
    with job_folder(replace(scenario, p1=max(scenario.p1, 0.1))) as job:
        proxies = job.export(job.model, "proxies")
        updates = [send(proxies / name, job.root / f"u-{name}", noise(len(name), 0.02)) for name in ("ann", "bob")]
        changed = job.rewritten("changed", kind)
        merge(
            str(changed),
            updates,
            job.root / "next",
            key=job.key,
            ledger=job.root / "ledger.jsonl",
            normalize=normalize,
        )
        seen = seen_by([proxies / "ann", proxies / "bob"])
        hidden = hidden_elements(job.model, job.key)
        assert not any((flags & hidden[name].reshape(flags.shape)).any() for name, flags in seen.items())
        check_unseen(changed, job.root / "next", seen)


@few(10)
@given(scenarios(p1=0.3, p2=0.5))
def test_i3_a_server_model_keeps_its_holes(scenario: Scenario) -> None:
    with job_folder(scenario) as job:
        server = job.server(job.model, "server")
        proxies = job.export(server, "proxies")
        updates = [send(proxies / name, job.root / f"u-{name}", noise(len(name), 0.02)) for name in ("ann", "bob")]
        merge(str(server), updates, job.root / "next", key=job.key, ledger=job.root / "ledger.jsonl")
        check_unseen(server, job.root / "next", seen_by([proxies / "ann", proxies / "bob"]))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_i3_residuals_of_hidden_and_unseen_units_stay_zero(dtype: str, folder: Path) -> None:
    job = JobFolder(Scenario("gpt2", dtype, 33, 51, 1, "neuron", "nf4", None, 64, False, "zero", 0.3, 0.5), folder)
    model = make_model(job.model, "gpt2", dtype=dtype, hidden=33, inner=51)
    for number in (1, 2):
        proxies = job.export(model, f"proxies-{number}", clients=("ann",), schedule="sticky", round=number)
        update = send(proxies / "ann", folder / f"u-{number}", noise(number, 0.02))
        merge(str(model), [update], folder / f"next-{number}", key=job.key, ledger=folder / "ledger.jsonl")
        model = folder / f"next-{number}"
    residual = read_file(model / "fedqsn-residual.safetensors")
    for name, flags in visible_elements(proxies / "ann").items():
        bits = residual[name][1].reshape(flags.shape)
        assert not bits[~flags].any()
        assert bits[flags].any()


def test_i3_the_server_models_own_bits_are_those_of_the_global_model(folder: Path) -> None:
    model = make_model(folder / "model", "bert", dtype="F16", hidden=33)
    mask(str(model), folder / "server", key=folder / "key", p1=0.5)
    hidden = hidden_elements(model, folder / "key")
    before, after = read_model(model), read_model(folder / "server")
    for name, (_, bits) in before.items():
        np.testing.assert_array_equal(bits[~hidden[name]], after[name][1][~hidden[name]])
