"""I7, FedAvg limit, and I8, zero update."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqsn_cli import merge
from support.helpers import (
    SHAPES,
    draft,
    make_config,
    make_model,
    make_tensors,
    noise,
    read_model,
    send,
    to_bits,
    to_floats,
    write_file,
    write_model,
)
from support.scenario import JobFolder, Scenario, few, job_folder, scenarios

PLAIN = {"format": "none", "layout": None, "double_quant": False, "fill": "zero", "p1": 0.0, "p2": 0.0}


# ---------------------------------------------------------------- I7


@few(20)
@given(
    scenarios(**PLAIN),
    st.lists(st.integers(1, 10**6), min_size=1, max_size=3),
    st.sampled_from(["coverage", "clients"]),
    st.sampled_from([1.0, 0.3]),
)
def test_i7_without_masks_and_quantization_merge_is_weighted_fedavg(
    scenario: Scenario, examples: list[int], normalize: str, rate: float
) -> None:
    clients = tuple(f"c{index}" for index in range(len(examples)))
    with job_folder(scenario) as job:
        proxies = job.export(job.model, "proxies", clients=clients)
        drafts = [draft(proxies / f"c{i}", noise(i), examples=n) for i, n in enumerate(examples)]
        updates = [update.write(job.root / f"u{index}") for index, update in enumerate(drafts)]
        merge(
            str(job.model),
            updates,
            job.root / "next",
            key=job.key,
            ledger=job.root / "ledger.jsonl",
            normalize=normalize,
            server_lr=rate,
            max_examples=10**6,
        )
        before, after = read_model(job.model), read_model(job.root / "next")
        for name, (dtype, bits) in before.items():
            if dtype == "I64":
                continue
            u = [update.tensors[name][1].view(np.float32).astype(np.float64).reshape(bits.shape) for update in drafts]
            weighted_sum = sum(n * x for n, x in zip(examples, u, strict=True))
            step = rate * weighted_sum / sum(examples)  # in this order, as `merge`: the last bit depends on it
            expected = to_bits((to_floats(bits, dtype).astype(np.float64) + step).astype(np.float32), dtype)
            still = step == 0  # a weight that does not move keeps its bits: -0.0 stays -0.0
            np.testing.assert_array_equal(after[name][1], np.where(still, bits, expected))


def test_i7_proxies_without_masks_and_quantization_are_the_model_itself(folder: Path) -> None:
    job = JobFolder(Scenario("gpt2", "BF16", 33, 51, 1, "neuron", **PLAIN, block_size=64), folder)
    make_model(job.model, "gpt2", dtype="BF16", hidden=33, inner=51)
    proxy = job.export(job.model, "proxies", clients=("ann",)) / "ann"
    assert (proxy / "model.safetensors").read_bytes() == (job.model / "model.safetensors").read_bytes()


def test_i7_merging_trained_models_is_their_weighted_mean(folder: Path) -> None:
    """U = T - P is rounded to fp32 once, so the mean of the T's is met to the last bits."""
    job = JobFolder(Scenario("bert", "F32", 32, 48, 1, "neuron", **PLAIN, block_size=64), folder)
    make_model(job.model, "bert")
    proxies = job.export(job.model, "proxies")
    start = {name: bits.view(np.float32) for name, (dtype, bits) in read_model(job.model).items() if dtype == "F32"}
    trained = [{name: w + noise(seed, 0.05)(name, w.shape) for name, w in start.items()} for seed in (1, 2)]
    updates = [
        send(proxies / client, folder / f"u-{client}", lambda name, shape, t=t: t[name] - start[name], examples=n)
        for client, t, n in zip(("ann", "bob"), trained, (30, 10), strict=True)
    ]
    merge(str(job.model), updates, folder / "next", key=job.key, ledger=folder / "ledger.jsonl")
    after = read_model(folder / "next")
    for name in start:
        mean = (30 * trained[0][name].astype(np.float64) + 10 * trained[1][name]) / 40
        np.testing.assert_allclose(after[name][1].view(np.float32), mean, rtol=0, atol=2**-24)


# ---------------------------------------------------------------- I8


@few(30)
@given(scenarios(shards=1), st.sampled_from(["fp32", "bf16", "fp16"]), st.sampled_from(["coverage", "clients"]))
def test_i8_merging_zero_updates_gives_a_byte_equal_model(scenario: Scenario, precision: str, normalize: str) -> None:
    with job_folder(scenario) as job:
        proxies = job.export(job.model, "proxies")
        updates = [
            send(proxies / "ann", job.root / "u-ann", precision=precision),
            send(proxies / "bob", job.root / "u-bob", lambda name, shape: np.full(shape, -0.0), precision=precision),
        ]
        merge(
            str(job.model),
            updates,
            job.root / "next",
            key=job.key,
            ledger=job.root / "ledger.jsonl",
            normalize=normalize,
        )
        assert (job.root / "next/model.safetensors").read_bytes() == (job.model / "model.safetensors").read_bytes()
        assert (job.root / "next/config.json").read_bytes() == (job.model / "config.json").read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_i8_zero_updates_reproduce_a_file_of_the_safetensors_library(dtype: str, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    rng = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.randn(shape, generator=rng).mul(0.1).to(getattr(torch, dtype))
        for name, shape in SHAPES["bert"][0](33, 51, 41).items()
    }
    tensors["bert.pooler.dense.weight"][0] = -0.0
    tensors["bert.pooler.dense.bias"][:] = -0.0
    tensors["bert.embeddings.position_ids"] = torch.arange(7)[None]
    model = write_model(folder / "model", make_tensors("bert"), make_config("bert"))
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    job = JobFolder(Scenario("bert", "F32", 33, 51, 1, "neuron", "nf4", None, 64, False, "zero", 0.3, 0.2), folder)
    proxies = job.export(model, "proxies")
    updates = [send(proxies / name, folder / f"u-{name}") for name in ("ann", "bob")]
    merge(str(model), updates, folder / "next", key=job.key, ledger=folder / "ledger.jsonl")
    assert (folder / "next/model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


@pytest.mark.parametrize("metadata", [None, {"format": "pt", "note": "owner's"}, {"format": "np"}])
def test_i8_the_metadata_of_a_file_stays(metadata: dict[str, str] | None, folder: Path) -> None:
    model = make_model(folder / "model", "llama", hidden=33)
    write_file(model / "model.safetensors", make_tensors("llama", hidden=33), metadata)
    job = JobFolder(Scenario("llama", "F32", 33, 48, 1, "neuron", "nf4", None, 64, False, "zero", 0.3, 0.2), folder)
    proxies = job.export(model, "proxies")
    merge(
        str(model),
        [send(proxies / "ann", folder / "u")],
        folder / "next",
        key=job.key,
        ledger=folder / "ledger.jsonl",
    )
    assert (folder / "next/model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


@few(12)
@given(scenarios(shards=1, dtype="BF16"), st.booleans())
def test_i8_zero_updates_keep_a_residual_bit_for_bit(scenario: Scenario, on_server: bool) -> None:
    with job_folder(replace(scenario, dtype="BF16" if scenario.hidden % 2 else "F16")) as job:
        model = job.server(job.model, "server") if on_server else job.model
        for number, values in enumerate((noise(1, 0.02), None), start=1):
            proxies = job.export(model, f"proxies-{number}", round=number)
            updates = [send(proxies / name, job.root / f"u{number}-{name}", values) for name in ("ann", "bob")]
            following = job.root / f"next-{number}"
            merge(str(model), updates, following, key=job.key, ledger=job.root / "ledger.jsonl")
            before, model = model, following
        for file in ("model.safetensors", "fedqsn-residual.safetensors"):
            assert (model / file).read_bytes() == (before / file).read_bytes()
        moved = any(bits.any() for _, bits in read_model(before).values())
        assert moved
