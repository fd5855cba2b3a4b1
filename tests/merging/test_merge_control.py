"""merge --control against a few lines of numpy; hidden stays, determinism and zero updates with a control; refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqsn_cli import merge
from fedqsn_cli.errors import InputError, RefusedUpdate
from fedqsn_cli.merging.results import MergedClient
from invariants.test_i3_hidden_stays import seen_by
from merging.test_merge import fedavg, whole_update
from support.helpers import (
    contents,
    draft,
    hidden_elements,
    make_model,
    noise,
    nothing_written,
    read_model,
    send,
    to_floats,
)
from support.passes import chunks_of, threads_of
from support.scenario import KINDS, JobFolder, Scenario, few, job_folder, scenarios

USUAL = Scenario("bert", "F32", 33, 48, 1, "neuron", "nf4", None, 64, False, "zero", 0.3, 0.4)
EXAMPLES = [7, 30]


def play(job: JobFolder, source: Path | None = None, **options: Any) -> tuple[list[Path], list[Any], Path, Any]:
    """Two clients' updates, and a control that the owner trained on a proxy without a client mask."""
    source = source or job.model
    released = job.export(source, "proxies", clients=("c0", "c1"))
    proxies = [released / "c0", released / "c1"]
    proxies.append(job.export(source, "own", clients=("own",), p2=0.0) / "own")
    sizes = enumerate([*EXAMPLES, 999])
    drafts = [draft(proxy, noise(i), examples=n, **options) for proxy, (i, n) in zip(proxies, sizes, strict=True)]
    folders = [each.write(job.root / f"u{i}") for i, each in enumerate(drafts)]
    parts = [whole_update(proxy, each) for proxy, each in zip(proxies, drafts, strict=True)]
    return folders[:2], parts[:2], folders[2], parts[2]


def records(job: JobFolder) -> dict[str, Any]:
    return {"key": job.key, "ledger": job.root / "ledger.jsonl"}


@few(25)
@given(
    scenarios(),
    st.sampled_from(["coverage", "clients"]),
    st.sampled_from([1.0, 0.25]),
    st.sampled_from([1.0, 2.0]),
    st.sampled_from(["fp32", "bf16"]),
)
def test_a_control_is_taken_off_where_it_and_a_client_saw_the_unit(
    scenario: Scenario, normalize: str, weight: float, rate: float, precision: str
) -> None:
    with job_folder(scenario) as job:
        updates, parts, control, own = play(job, precision=precision)
        merge(
            str(job.model),
            updates,
            job.root / "next",
            **records(job),
            normalize=normalize,
            server_lr=rate,
            control=control,
            control_weight=weight,
        )
        before, after = read_model(job.model), read_model(job.root / "next")
        for name, (u, seen, s) in own.items():
            dtype, bits = before[name]
            old = to_floats(bits, dtype).astype(np.float64).reshape(-1)
            shown = [part[name][1].reshape(-1) for part in parts]
            mean = fedavg(np.zeros(old.size), [part[name] for part in parts], EXAMPLES, normalize, 1.0)
            anyone = shown[0] | shown[1]
            share = (shown[0] * EXAMPLES[0] + shown[1] * EXAMPLES[1]) / sum(EXAMPLES)
            drift = weight * (u * seen).reshape(-1) / s * (share if normalize == "clients" else anyone)
            wanted = old + rate * (mean - drift)
            result = to_floats(after[name][1], dtype).reshape(-1)
            digits = {"F32": 2**-23, "F16": 2**-10, "BF16": 2**-7}[dtype]
            assert (np.abs(result - wanted) <= np.abs(wanted) * digits + 1e-6).all()
            np.testing.assert_array_equal(after[name][1].reshape(-1)[~anyone], bits.reshape(-1)[~anyone])
            if dtype == "F32" and name != "bert.embeddings.position_ids":
                assert np.count_nonzero(result[anyone] != old[anyone]) > 0.9 * np.count_nonzero(anyone)


@few(15)
@given(scenarios(), st.sampled_from(KINDS))
def test_i3_hidden_and_unseen_units_keep_their_bits_with_a_control(scenario: Scenario, kind: str) -> None:
    with job_folder(replace(scenario, p1=max(scenario.p1, 0.1), p2=max(scenario.p2, 0.3))) as job:
        updates, _, control, _ = play(job)
        changed = job.rewritten("changed", kind)
        merge(str(changed), updates, job.root / "next", **records(job), control=control)
        seen = seen_by([job.root / "proxies/c0", job.root / "proxies/c1"])
        hidden = hidden_elements(job.model, job.key)
        old, new = read_model(changed), read_model(job.root / "next")
        for name, flags in seen.items():
            assert not (flags & hidden[name].reshape(flags.shape)).any()
            was, now = old[name][1].reshape(flags.shape), new[name][1].reshape(flags.shape)
            np.testing.assert_array_equal(was[~flags], now[~flags])


@few(10)
@given(scenarios(p1=0.3, p2=0.3, shards=1), st.sampled_from(["coverage", "clients"]))
def test_i4_order_chunks_and_threads_change_no_byte_with_a_control(scenario: Scenario, normalize: str) -> None:
    with job_folder(scenario) as job:
        updates, _, control, _ = play(job)
        how = records(job) | {"normalize": normalize, "control": control, "control_weight": 0.7}
        merge(str(job.model), updates, job.root / "next", **how)
        with chunks_of(300), threads_of(2):
            merge(str(job.model), updates[::-1], job.root / "again", **how)
        assert contents(job.root / "next") == contents(job.root / "again")


@few(10)
@given(scenarios(), st.sampled_from(["coverage", "clients"]))
def test_i8_a_control_of_zeros_changes_no_byte(scenario: Scenario, normalize: str) -> None:
    with job_folder(scenario) as job:
        updates, _, _, _ = play(job)
        nothing = send(job.root / "own/own", job.root / "nothing", examples=50)
        merge(str(job.model), updates, job.root / "next", **records(job), normalize=normalize)
        merge(str(job.model), updates, job.root / "same", **records(job), normalize=normalize, control=nothing)
        assert contents(job.root / "next") == contents(job.root / "same")


@few(6)
@given(scenarios(p2=0.0, shards=1))
def test_i8_clients_that_learnt_what_the_control_learnt_change_nothing(scenario: Scenario) -> None:
    """One mask for all, so that equal updates are equal steps."""
    with job_folder(replace(scenario, dtype="F32")) as job:
        proxies = [job.export(job.model, f"p-{name}", clients=(name,)) / name for name in ("ann", "own")]
        updates = [send(proxy, job.root / f"u{i}", noise(1), examples=4) for i, proxy in enumerate(proxies)]
        merge(str(job.model), updates[:1], job.root / "next", **records(job), control=updates[1])
        before, after = read_model(job.model), read_model(job.root / "next")
        assert all(np.array_equal(before[name][1], after[name][1]) for name in before)


@pytest.fixture
def job(folder: Path) -> JobFolder:
    make_model(folder / "model", "bert", hidden=33)
    job = JobFolder(USUAL, folder)
    play(job)
    return job


def merged(job: JobFolder, *updates: str, **options: Any) -> Any:
    folders = [job.root / name for name in updates]
    return merge(str(job.model), folders, job.root / "next", **records(job) | options)


def test_the_result_has_the_control_apart_from_the_clients(job: JobFolder) -> None:
    result = merged(job, "u0", "u1", control=job.root / "u2")
    assert [client.client for client in result.clients] == ["c0", "c1"]
    assert (result.control.client, result.control.share, result.control.num_examples) == ("own", 0.0, 999)
    assert result.num_examples == sum(EXAMPLES)
    alone = merge(str(job.model), [job.root / "u0", job.root / "u1"], job.root / "plain", **records(job))
    assert (alone.control, alone.covered) == (None, result.covered)
    assert [told(client) for client in alone.clients] == [told(client) for client in result.clients]
    for one, other in zip(alone.clients, result.clients, strict=True):
        assert measured(one) == pytest.approx(measured(other), rel=1e-12)  # squares are added in another order


def measured(client: MergedClient) -> tuple[float | None, ...]:
    """What a merge measures of an update."""
    ratios = client.largest_tensor.ratio, client.largest_unit.ratio
    return client.norm, client.relative_norm, client.cosine, *ratios


def told(client: MergedClient) -> MergedClient:
    """All that is said of an update but what is measured of it."""
    places = [replace(place, ratio=0.0) for place in (client.largest_tensor, client.largest_unit)]
    return replace(client, norm=0, relative_norm=0, cosine=0, largest_tensor=places[0], largest_unit=places[1])


def test_a_control_works_on_the_server_model_too(job: JobFolder) -> None:
    server = job.server(job.model, "server")
    options = {"control": job.root / "u2"}
    updates = [job.root / "u0", job.root / "u1"]
    merge(str(job.model), updates, job.root / "n-model", **records(job), **options)
    merge(str(server), updates, job.root / "n-server", **records(job), **options)
    assert contents(job.export(job.root / "n-model", "r2", round=2)) == contents(
        job.export(job.root / "n-server", "again", round=2)
    )


def test_i11_a_control_that_does_not_belong_is_refused(job: JobFolder) -> None:
    other = make_model(job.root / "other", "bert", hidden=33, seed=4)
    foreign = send(job.export(other, "p-other", clients=("own",), round=2) / "own", job.root / "foreign", noise(1))
    unknown = draft(job.root / "own/own", noise(1))
    unknown.manifest["proxy_id"] = "0" * 64
    unknown.write(job.root / "unknown")
    late = send(job.export(job.model, "p2", clients=("c1",), round=2) / "c1", job.root / "late", noise(1))
    with nothing_written(job.root):
        with pytest.raises(RefusedUpdate, match="another model"):
            merged(job, "u0", control=foreign)
        with pytest.raises(RefusedUpdate, match="not in the ledger"):
            merged(job, "u0", control=job.root / "unknown")
        for control in (job.root / "u1", late):
            with pytest.raises(RefusedUpdate, match="'c1' sent an update too"):
                merged(job, "u0", "u1", control=control)
        with pytest.raises(InputError, match="no update was given"):
            merged(job, control=job.root / "u2")
        with pytest.raises(InputError, match="--control"):
            merged(job, restore="server", control=job.root / "u2")
        for weight in (0.0, -1.0, 1.5, float("nan")):
            with pytest.raises(InputError, match="--control-weight"):
                merged(job, "u0", control=job.root / "u2", control_weight=weight)
        with pytest.raises(InputError, match="--control-weight"):
            merged(job, "u0", control_weight=0.5)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e9])
def test_i11_a_poisoned_control_is_refused(value: float, job: JobFolder) -> None:
    def poison(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.full(shape, value if name == "classifier.bias" else 0.0, np.float32)

    send(job.root / "own/own", job.root / "poison", poison)
    with nothing_written(job.root), pytest.raises(RefusedUpdate, match="poison"):
        merged(job, "u0", control=job.root / "poison")


def test_i11_a_control_whose_bytes_changed_is_refused(job: JobFolder) -> None:
    path = job.root / "u2/update.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with nothing_written(job.root), pytest.raises(RefusedUpdate, match="its digest is not"):
        merged(job, "u0", control=job.root / "u2")
