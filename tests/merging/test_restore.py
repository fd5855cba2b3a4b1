"""merge --restore: the trained visible part and the hidden part become one model again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqsn_cli import mask, merge, quantize
from fedqsn_cli.errors import InputError, KeyFileError, OutputExists
from support.helpers import (
    contents,
    hidden_elements,
    make_model,
    noise,
    nothing_written,
    read_model,
    send,
    to_bits,
    to_floats,
)
from support.scenario import JobFolder, Scenario, few, job_folder, scenarios

USUAL = Scenario("bert", "F32", 33, 48, 1, "neuron", "nf4", None, 64, False, "zero", 0.3, 0.2)


def play(job: JobFolder, rounds: int) -> tuple[Path, Path]:
    """Rounds merged into the global model and, side by side, into the server model; both as they end."""
    whole, server = job.model, job.server(job.model, "server")
    records = {"key": job.key, "ledger": job.root / "ledger.jsonl"}
    for number in range(1, rounds + 1):
        proxies = job.export(server, f"p{number}", round=number)
        updates = [
            send(proxies / name, job.root / f"u{number}-{name}", noise(number, 0.003), examples=number + len(name))
            for name in ("ann", "bob")
        ]
        merge(str(whole), updates, job.root / f"whole-{number}", **records)
        merge(str(server), updates, job.root / f"server-{number}", **records)
        whole, server = job.root / f"whole-{number}", job.root / f"server-{number}"
    return whole, server


def restored(job: JobFolder, server: Path, **options: Any) -> Path:
    out = job.root / f"restored{options.get('blend', '')}"
    merge(str(job.model), [], out, key=job.key, restore=str(server), **options)
    return out


def test_force_replaces_no_model_of_another_kind(folder: Path) -> None:
    job = JobFolder(USUAL, folder)
    make_model(job.model, "bert", hidden=33)
    whole, server = play(job, 1)
    packed = job.quantized(server, "packed")
    again = {"key": job.key, "force": True}
    update = [job.root / "u1-ann"]
    with nothing_written(job.root):
        with pytest.raises(OutputExists, match="is a server model, not a global model; choose another path"):
            merge(str(job.model), [], server, restore=server, **again)
        with pytest.raises(OutputExists, match="is a server model, not a global model"):
            merge(str(job.model), update, server, ledger=job.root / "ledger.jsonl", **again)
        with pytest.raises(OutputExists, match="is a global model, not a server model"):
            mask(str(job.model), whole, p1=0.3, **again)
        with pytest.raises(OutputExists, match="is a quantized server model, not a server model"):
            mask(str(job.model), packed, p1=0.3, **again)
        with pytest.raises(OutputExists, match="is a server model, not a quantized server model"):
            quantize(str(server), server, format="nf4", force=True)
    merge(str(job.model), [], whole, restore=server, **again)


@few(20)
@given(scenarios(shards=1))
def test_both_ways_to_the_end_of_a_job_give_byte_equal_models(scenario: Scenario) -> None:
    with job_folder(scenario) as job:
        whole, server = play(job, 1)
        one, other = contents(whole), contents(restored(job, server))
        del one["fedqsn.json"], other["fedqsn.json"]  # they say what they were made from
        assert one == other


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("fill", ["zero", "base"])
def test_both_ways_are_equal_after_three_rounds_with_their_residuals(dtype: str, fill: str, folder: Path) -> None:
    sizes = {"dtype": dtype, "hidden": 33, "inner": 48}
    job = JobFolder(replace(USUAL, family="gpt2", dtype=dtype, fill=fill), folder)
    make_model(job.model, "gpt2", **sizes)
    make_model(folder / "base", "gpt2", seed=1, **sizes)
    whole, server = play(job, 3)
    one, other = contents(whole), contents(restored(job, server))
    del one["fedqsn.json"], other["fedqsn.json"]
    assert ("fedqsn-residual.safetensors" in one) == (dtype != "F32")
    assert one == other


@few(8)
@given(scenarios(), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_a_blend_interpolates_hidden_weights_and_the_visible_scale(scenario: Scenario, blend: float) -> None:
    check_blend(scenario, blend)


@few(5)
@given(scenarios(dtype="F32", p1=0.5, fill="zero"), st.sampled_from([0.25, 0.5]))
def test_a_blend_of_an_fp32_model_is_exact(scenario: Scenario, blend: float) -> None:
    check_blend(scenario, blend)


@few(5)
@given(scenarios(dtype="F32", p1=0.5, fill="base"), st.sampled_from([0.25, 0.5]))
def test_a_blend_with_a_public_base_is_exact(scenario: Scenario, blend: float) -> None:
    check_blend(scenario, blend)


def check_blend(scenario: Scenario, blend: float) -> None:
    with job_folder(scenario) as job:
        _, server = play(job, 1)
        result = read_model(restored(job, server, blend=blend))
        before, trained = read_model(job.model), read_model(server)
        holes = read_model(job.root / "base") if scenario.fill == "base" else {}
        for name, hidden in hidden_elements(job.model, job.key).items():
            dtype, bits = trained[name]
            if not hidden.any():
                np.testing.assert_array_equal(result[name][1], bits)
                continue
            w, x = (to_floats(model[name][1], dtype).astype(np.float64) for model in (before, trained))
            r = to_floats(holes[name][1], dtype).astype(np.float64) if holes else np.zeros_like(w)
            s = share_factor(hidden) if scenario.fill == "zero" else 1.0
            wanted = np.where(hidden, r + blend * (w - r), x * (s + blend * (1 - s))).astype(np.float32)
            expected = to_floats(to_bits(wanted, dtype), dtype)
            np.testing.assert_allclose(to_floats(result[name][1], dtype), expected, rtol=TOLERANCE[dtype], atol=1e-7)


TOLERANCE = {"F32": 1e-6, "F16": 2**-10, "BF16": 2**-7}  # s is kept in fp32: a rounding may fall to the other side


def share_factor(hidden: np.ndarray) -> float:
    """n / (n - hidden) of a tensor, from its own elements."""
    return hidden.size / (hidden.size - int(np.count_nonzero(hidden)))


def test_blend_0_is_the_trained_server_model_with_its_scale(folder: Path) -> None:
    from fedqsn_cli.checkpoint import Checkpoint
    from fedqsn_cli.models.dense import load_dense

    make_model(folder / "model", "llama", hidden=33)
    job = JobFolder(replace(USUAL, family="llama"), folder)
    _, server = play(job, 1)
    result = read_model(restored(job, server, blend=0.0))
    with Checkpoint.open(server) as checkpoint:
        dense = load_dense(checkpoint)
    for name, (dtype, bits) in result.items():
        np.testing.assert_array_equal(to_floats(bits, dtype), dense[name].numpy())


@pytest.mark.parametrize("blend", [0.0, 1.0])
def test_hidden_weights_that_are_not_finite_come_back_or_stay_out_whole(blend: float, folder: Path) -> None:
    job = JobFolder(replace(USUAL, family="llama", hidden=33), folder)
    make_model(job.model, "llama", hidden=33)
    server = job.server(job.model, "server")
    broken = job.rewritten("broken", "all of it")
    merge(str(broken), [], folder / "out", key=job.key, restore=str(server), blend=blend)
    result, original = read_model(folder / "out"), read_model(broken)
    for name, hidden in hidden_elements(job.model, job.key).items():
        if blend == 1:
            np.testing.assert_array_equal(result[name][1], original[name][1])
        else:
            assert not result[name][1][hidden].any()


def test_a_server_model_without_rescaling_is_not_scaled_by_a_blend(folder: Path) -> None:
    model = make_model(folder / "model", "llama", hidden=33)
    mask(str(model), folder / "server", key=folder / "key", p1=0.3, rescale=False)
    merge(str(model), [], folder / "out", key=folder / "key", restore=str(folder / "server"), blend=0.0)
    one, other = read_model(folder / "out"), read_model(folder / "server")
    assert all(np.array_equal(one[name][1], other[name][1]) for name in one)


def test_restoring_an_untrained_server_model_gives_the_global_model(folder: Path) -> None:
    model = make_model(folder / "model", "bert", dtype="BF16", hidden=33)
    mask(str(model), folder / "server", key=folder / "key", p1=0.3)
    merge(str(model), [], folder / "out", key=folder / "key", restore=str(folder / "server"))
    assert (folder / "out/model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


@pytest.fixture
def job(folder: Path) -> JobFolder:
    make_model(folder / "model", "bert", hidden=33)
    job = JobFolder(USUAL, folder)
    job.server(job.model, "server")
    return job


@pytest.mark.parametrize("blend", [-0.1, 1.1, float("nan"), float("inf")])
def test_i11_a_blend_out_of_range_is_refused(blend: float, job: JobFolder) -> None:
    with nothing_written(job.root), pytest.raises(InputError, match="blend"):
        restored(job, job.root / "server", blend=blend)


def test_i11_models_that_do_not_belong_together_are_not_restored(job: JobFolder) -> None:
    packed = job.quantized(job.root / "server", "packed")
    proxy = job.export(job.model, "proxies") / "ann"
    mask(str(job.model), job.root / "foreign", key=job.root / "other.key", p1=0.3)
    other = make_model(job.root / "other", "bert", hidden=32)
    with nothing_written(job.root):
        for server in (packed, proxy, job.root / "foreign", job.model, job.root / "nowhere"):
            with pytest.raises(InputError):
                restored(job, server)
        with pytest.raises(InputError, match="server model"):
            merge(str(job.root / "server"), [], job.root / "out", key=job.key, restore=str(job.root / "server"))
        with pytest.raises(KeyFileError):
            merge(
                str(job.model),
                [],
                job.root / "out",
                key=job.root / "other.key",
                restore=str(job.root / "server"),
            )
        with pytest.raises(InputError):
            merge(str(other), [], job.root / "out", key=job.key, restore=str(job.root / "server"))
