"""merge against a few lines of numpy: every axis, dtype, format, fill and normalization; rounds with a residual."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedqsn_cli import merge
from fedqsn_cli.errors import InputError, KeyFileError
from support.helpers import (
    Update,
    contents,
    draft,
    make_config,
    make_model,
    make_tensors,
    noise,
    nothing_written,
    read_file,
    read_model,
    send,
    to_bits,
    to_floats,
    visible_elements,
    write_model,
)
from support.scenario import JobFolder, Scenario, few, job_folder, scenarios

Doubles = NDArray[np.float64]
USUAL = Scenario("bert", "F32", 33, 48, 1, "neuron", "nf4", None, 64, False, "zero", 0.3, 0.2)


def whole_update(proxy: Path, update: Update) -> dict[str, tuple[Doubles, NDArray[np.bool_], float]]:
    """U in full shape (0 where not seen), the seen elements, and s, for every float tensor."""
    manifest = json.loads((proxy / "proxy.json").read_bytes())
    shown = visible_elements(proxy)
    found = {}
    for name, (dtype, bits) in update.tensors.items():
        values = to_floats(bits, dtype).astype(np.float64)
        if name not in shown:
            found[name] = (values, np.ones(values.shape, np.bool_), 1.0)
            continue
        flags = shown[name]
        whole = np.zeros(flags.shape)
        if manifest["tensors"][name]["axis"] == "column":  # seen columns side by side, slice after slice
            for part, seen, u in zip(whole, flags, values.reshape(len(whole), flags.shape[1], -1), strict=True):
                part[seen] = u.reshape(-1)
        else:
            whole[flags] = values.reshape(-1)
        s = flags[0].size / int(flags[0].sum()) if manifest["rescale"] else 1.0
        found[name] = (whole, flags, float(np.float32(s)))
    return found


def fedavg(before: Doubles, parts: list[Any], examples: list[int], normalize: str, rate: float) -> Doubles:
    """The formula of a merge, Δ = Σ n_k Δ_k / Σ n_k, in double precision."""
    total, weight = np.zeros(before.size), np.zeros(before.size)
    for (u, seen, s), n in zip(parts, examples, strict=True):
        total += n * u.reshape(-1) / s * seen.reshape(-1)
        weight += n * seen.reshape(-1)
    if normalize == "clients":
        weight = np.where(weight > 0, sum(examples), 0)
    delta = np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)
    return before + rate * delta.reshape(before.shape)


@few(30)
@given(
    scenarios(),
    st.lists(st.integers(1, 1000), min_size=1, max_size=3),
    st.sampled_from(["coverage", "clients"]),
    st.sampled_from([1.0, 0.5, 2.0]),
    st.sampled_from(["fp32", "bf16", "fp16"]),
)
def test_merge_is_the_average_over_the_clients_that_saw_a_unit(
    scenario: Scenario, examples: list[int], normalize: str, rate: float, precision: str
) -> None:
    clients = tuple(f"c{index}" for index in range(len(examples)))
    with job_folder(scenario) as job:
        proxies = job.export(job.model, "proxies", clients=clients)
        drafts = [draft(proxies / f"c{i}", noise(i), examples=n, precision=precision) for i, n in enumerate(examples)]
        folders = [update.write(job.root / f"u{index}") for index, update in enumerate(drafts)]
        merge(
            str(job.model),
            folders,
            job.root / "next",
            key=job.key,
            ledger=job.root / "ledger.jsonl",
            normalize=normalize,
            server_lr=rate,
            max_examples=1000,
        )
        parts = [whole_update(proxies / f"c{index}", update) for index, update in enumerate(drafts)]
        before, after = read_model(job.model), read_model(job.root / "next")
        for name in parts[0]:
            dtype, bits = before[name]
            old = to_floats(bits, dtype).astype(np.float64)
            wanted = fedavg(old, [part[name] for part in parts], examples, normalize, rate)
            result = to_floats(after[name][1], dtype)
            precision = {"F32": 2**-23, "F16": 2**-10, "BF16": 2**-7}[dtype]
            assert (np.abs(result - wanted) <= np.abs(wanted) * precision + 1e-7).all()
            np.testing.assert_array_equal(after[name][1][wanted == old], bits[wanted == old])


@few(12)
@given(scenarios(shards=1, p2=0.3), st.sampled_from(["coverage", "clients"]))
def test_merging_into_the_server_model_moves_its_visible_part_like_the_global_model(
    scenario: Scenario, normalize: str
) -> None:
    with job_folder(scenario) as job:
        server = job.server(job.model, "server")
        proxies = job.export(server, "proxies")
        updates = [send(proxies / name, job.root / f"u-{name}", noise(len(name))) for name in ("ann", "bob")]
        records = {"key": job.key, "ledger": job.root / "ledger.jsonl", "normalize": normalize}
        results = [merge(str(at), updates, job.root / f"n-{at.name}", **records) for at in (job.model, server)]
        assert results[0].clients == results[1].clients
        assert contents(job.export(job.root / "n-model", "round-2", round=2)) == contents(
            job.export(job.root / "n-server", "again-2", round=2)
        )


def rounds_of(job: JobFolder, count: int, size: float) -> tuple[Path, dict[str, Doubles]]:
    """`count` rounds of small steps in one direction; the last model and the result in double precision."""
    model = job.model
    exact = {
        name: to_floats(bits, dtype).astype(np.float64)
        for name, (dtype, bits) in read_model(model).items()
        if dtype != "I64"
    }
    steps = noise(1, size)
    for number in range(1, count + 1):
        proxy = job.export(model, f"p{number}", clients=("ann",), round=number) / "ann"
        update = send(proxy, job.root / f"u{number}", steps)
        following = job.root / f"n{number}"
        merge(str(model), [update], following, key=job.key, ledger=job.root / "ledger.jsonl")
        exact = {name: w + to_floats(to_bits(steps(name, w.shape), "F32"), "F32") for name, w in exact.items()}
        model = following
    return model, exact


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_fifty_rounds_of_tiny_updates_are_not_lost_in_a_16_bit_model(dtype: str, folder: Path) -> None:
    job = JobFolder(Scenario("llama", dtype, 33, 48, 1, "neuron", "none", None, 64, False, "zero", 0.0, 0.0), folder)
    make_model(job.model, "llama", dtype=dtype, hidden=33)
    model, exact = rounds_of(job, 50, 2e-5)
    after, residual = read_model(model), read_file(model / "fedqsn-residual.safetensors")
    digits = {"F16": 10, "BF16": 7}[dtype]
    moved = 0
    for name, wanted in exact.items():
        result = to_floats(after[name][1], dtype).astype(np.float64)
        ulp = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(wanted), 2.0**-14))) - digits)
        assert (np.abs(result - wanted) <= ulp).all()
        kept = to_floats(residual[name][1], "BF16")
        assert (np.abs(result + kept - wanted) <= ulp / 8 + 1e-7).all()
        before = read_model(job.model)[name][1]
        moved += np.count_nonzero(before != after[name][1])
    assert moved > sum(wanted.size for wanted in exact.values()) / 2


def test_a_plain_loader_sees_nothing_but_the_model(folder: Path) -> None:
    job = JobFolder(Scenario("llama", "BF16", 33, 48, 1, "neuron", "nf4", None, 64, False, "zero", 0.3, 0.2), folder)
    make_model(job.model, "llama", dtype="BF16", hidden=33)
    (job.model / "vocab.json").write_text("{}")
    model, _ = rounds_of(job, 1, 0.01)
    assert {path.name for path in model.iterdir()} == {
        "config.json",
        "fedqsn-residual.safetensors",
        "fedqsn.json",
        "model.safetensors",
        "vocab.json",
    }
    assert {name: bits.dtype for name, (_, bits) in read_model(model).items()} == dict.fromkeys(
        read_model(job.model), np.dtype(np.uint16)
    )


def test_no_residual_leaves_the_owner(folder: Path) -> None:
    job = JobFolder(Scenario("llama", "BF16", 33, 48, 1, "neuron", "nf4", None, 64, False, "zero", 0.3, 0.2), folder)
    make_model(job.model, "llama", dtype="BF16", hidden=33)
    model, _ = rounds_of(job, 1, 0.01)
    before = contents(job.export(model, "proxies", round=2))
    assert not any("residual" in name for name in before)
    (model / "fedqsn-residual.safetensors").unlink()
    assert contents(job.export(model, "again", round=2)) == before


def test_a_residual_that_is_a_link_to_nothing_is_not_taken_for_none(folder: Path) -> None:
    job = JobFolder(Scenario("llama", "BF16", 33, 48, 1, "neuron", "nf4", None, 64, False, "zero", 0.3, 0.2), folder)
    make_model(job.model, "llama", dtype="BF16", hidden=33)
    (job.model / "fedqsn-residual.safetensors").symlink_to("moved.safetensors")
    with nothing_written(job.root), pytest.raises(InputError, match=r"fedqsn-residual\.safetensors"):
        job.server(job.model, "server")


# ---------------------------------------------------------------- results, options


@pytest.fixture
def job(folder: Path) -> JobFolder:
    """A small BERT with two proxies and two updates."""
    make_model(folder / "model", "bert", hidden=33)
    job = JobFolder(USUAL, folder)
    proxies = job.export(job.model, "proxies")
    for name, examples in (("ann", 30), ("bob", 10)):
        send(proxies / name, folder / f"u-{name}", noise(1), examples=examples)
    return job


def merged(job: JobFolder, *updates: str, source: Path | None = None, **options: Any) -> Any:
    usual = {"key": job.key, "ledger": job.root / "ledger.jsonl"}
    folders = [job.root / name for name in updates]
    return merge(str(source or job.model), folders, job.root / "next", **usual | options)


def test_the_result_has_the_share_and_the_norm_of_each_client(job: JobFolder) -> None:
    result = merged(job, "u-bob", "u-ann")
    assert [client.client for client in result.clients] == ["ann", "bob"]
    assert [client.share for client in result.clients] == [0.75, 0.25]
    assert result.num_examples == 40
    assert result.clients[0].first_loss == 1.5
    assert 0 < result.clients[0].relative_norm < 1
    shown = [visible_elements(job.root / "proxies" / name) for name in ("ann", "bob")]
    total = sum(bits.size for _, bits in make_tensors("bert", hidden=33).values())
    unseen = sum(int((~(shown[0][name] | shown[1][name])).sum()) for name in shown[0])
    assert result.covered == pytest.approx(1 - (unseen + 7) / total)  # 7 position ids are not weights
    assert result.path == str(job.root / "next")
    assert result.kind == "global-model"


def test_updates_are_divided_by_the_scale_of_the_proxy(job: JobFolder) -> None:
    """The client computes with s · W, so its step is divided by s."""
    merged(job, "u-ann")
    proxy = job.root / "proxies/ann"
    shown = visible_elements(proxy)
    name = "bert.pooler.dense.weight"
    flags = shown[name][0]
    s = 33 / int(flags.any(axis=1).sum())
    before, after = (read_model(job.root / at)[name][1].view(np.float32) for at in ("model", "next"))
    np.testing.assert_allclose((after - before)[flags], (noise(1)(name, (33, 33)) / s)[flags], atol=1e-7)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"normalize": "median"}, "--normalize: 'median' is not a choice"),
    ({"server_lr": 0.0}, "--server-lr: .* is not a positive number"),
    ({"server_lr": -1.0}, "--server-lr: .* is not a positive number"),
    ({"server_lr": float("nan")}, "--server-lr: .* is not a positive number"),
    ({"server_lr": float("inf")}, "--server-lr: .* is not a positive number"),
    ({"max_update_norm": 0.0}, "norm"),
    ({"max_update_norm": float("nan")}, "norm"),
    ({"ledger": None}, "ledger"),
    ({"blend": 0.5}, "restore"),
    ({"max_shard_size": "0GB"}, "not a size"),
    ({"max_examples": 0}, "max-examples|examples"),
    ({"restore": "model"}, "no updates"),
]


@pytest.mark.parametrize(("options", "complaint"), WRONG, ids=lambda value: str(value)[:40])
def test_i11_wrong_options_of_merge_are_refused_and_nothing_is_written(
    options: dict[str, Any], complaint: str, job: JobFolder
) -> None:
    with nothing_written(job.root), pytest.raises(InputError, match=complaint):
        merged(job, "u-ann", **options)


def test_i11_no_update_no_key_and_no_ledger_are_refused(job: JobFolder) -> None:
    with nothing_written(job.root):
        with pytest.raises(InputError, match="no update"):
            merged(job)
        with pytest.raises(KeyFileError, match="no key"):
            merged(job, "u-ann", key=job.root / "nowhere")
        with pytest.raises(InputError, match="no ledger"):
            merged(job, "u-ann", ledger=job.root / "nowhere")
        with pytest.raises(InputError):
            merged(job, "nowhere")


def test_i11_quantized_models_proxies_and_updates_are_not_a_source(job: JobFolder) -> None:
    packed = job.quantized(job.server(job.model, "server"), "packed")
    for source in (packed, job.root / "proxies/ann", job.root / "u-ann"):
        with nothing_written(job.root), pytest.raises(InputError):
            merged(job, "u-ann", source=source)


def test_i11_a_model_with_another_plan_or_other_visible_weights_is_refused(job: JobFolder) -> None:
    other = make_model(job.root / "other", "bert", hidden=33, seed=9)
    smaller = make_model(job.root / "smaller", "bert", hidden=32)
    tensors = make_tensors("bert", hidden=33)
    dtype, bits = tensors["bert.embeddings.LayerNorm.weight"]
    tensors["bert.embeddings.LayerNorm.weight"] = (dtype, bits ^ 1)
    nearly = write_model(job.root / "nearly", tensors, make_config("bert"))
    for source in (other, smaller, nearly):
        with nothing_written(job.root), pytest.raises(InputError):
            merged(job, "u-ann", source=source)


def test_i11_a_merged_model_that_overflows_its_dtype_is_refused(folder: Path) -> None:
    job = JobFolder(Scenario("llama", "F16", 33, 48, 1, "neuron", "none", None, 64, False, "zero", 0.0, 0.0), folder)
    make_model(job.model, "llama", dtype="F16", hidden=33)
    proxy = job.export(job.model, "proxies", clients=("ann",)) / "ann"
    update = send(proxy, folder / "u", lambda name, shape: np.full(shape, 6e4, np.float32))
    with nothing_written(folder), pytest.raises(InputError):
        merge(
            str(job.model),
            [update],
            folder / "next",
            key=job.key,
            ledger=folder / "ledger.jsonl",
            server_lr=2.0,
            max_update_norm=1e9,
        )
