"""Merging adapters: the weighted mean of the clients' own products, beside full updates; hostile ones are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedqsn_cli import merge
from fedqsn_cli.errors import FedqsnError
from fedqsn_cli.merging.updates.adapters import Factor, KeptFactors
from fedqsn_cli.merging.updates.products import product
from merging.test_merge import fedavg, whole_update
from support.adapters import AdapterUpdate, draft_adapters
from support.helpers import (
    Update,
    contents,
    draft,
    make_model,
    noise,
    nothing_written,
    read_file,
    read_model,
    send,
    to_bits,
    to_floats,
    visible_elements,
)
from support.passes import chunks_of
from support.scenario import JobFolder, Scenario, few, job_folder, scenarios

Doubles = NDArray[np.float64]
WEIGHT = "bert.encoder.layer.0.attention.self.query.weight"
HEAD = ("classifier.weight", "classifier.bias")


@given(st.integers(1, 9), st.integers(0, 9), st.integers(1, 600), st.data())
def test_a_product_is_a_sum_in_one_order_whichever_of_its_elements_are_computed(
    rows: int, rank: int, cols: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(rows + cols)
    left, right = rng.standard_normal((rows, rank)), rng.standard_normal((rank, cols))
    whole, wanted = product(left, right, 1.5), np.zeros((rows, cols))
    for k in range(rank):
        wanted = wanted + left[:, k : k + 1] * right[k]
    np.testing.assert_array_equal(whole, (1.5 * wanted).astype(np.float32))
    first, start = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, cols - 1))
    np.testing.assert_array_equal(product(left[first:], right[:, start:], 1.5), whole[first:, start:])


def test_the_factors_that_were_read_last_are_kept_up_to_a_size() -> None:
    asked: list[int] = []

    def read(name: str, start: int, count: int) -> NDArray[np.uint8]:
        asked.append(start)
        return np.full(count // 4, start, np.float32).view(np.uint8)

    kept = KeptFactors(most_bytes=8 * 2 * 6)  # two factors in double precision
    factors = [Factor(start, "F32", 2, 3) for start in (1, 2, 3)]
    for number in (0, 1, 0, 1, 2, 1, 2, 0):
        rows, piece = kept.read(factors[number], read)
        assert piece.start == number + 1
        np.testing.assert_array_equal(rows, np.full((2, 3), number + 1.0))
    assert asked == [1, 2, 3, 1]
    large = Factor(7, "F32", 4, 4)
    assert kept.read(large, read)[0].shape == (4, 4)
    kept.read(large, read)
    assert asked[4:] == [7, 7]


def parts_of(
    proxy: Path, update: AdapterUpdate | Update, names: list[str]
) -> dict[str, tuple[Doubles, NDArray[np.bool_], float]]:
    """U, what is seen of it, and s, for every float tensor."""
    if isinstance(update, Update):
        return whole_update(proxy, update)
    manifest = json.loads((proxy / "proxy.json").read_bytes())
    shown, found = visible_elements(proxy), {}
    for name, (_, bits) in read_model(proxy.parents[1] / "model").items():
        if name not in names:
            continue
        flags = shown[name] if name in shown else np.ones(bits.shape, np.bool_)
        s = flags[0].size / int(flags[0].sum()) if name in shown and manifest["rescale"] else 1.0
        u = update.product(name) if name in update.manifest["adapters"] else np.zeros(bits.shape)
        found[name] = (u.reshape(flags.shape), flags, float(np.float32(s)))
    return found


@few(25)
@given(
    st.sampled_from(["neuron", "input"]).flatmap(lambda axis: scenarios(axis=axis)),
    st.lists(st.sampled_from([0, 1, 2, 5, 16]), min_size=1, max_size=3),
    st.sampled_from(["coverage", "clients"]),
    st.sampled_from(["fp32", "bf16", "fp16"]),
)
def test_the_merged_model_is_the_mean_of_the_products_and_of_full_updates(
    scenario: Scenario, ranks: list[int], normalize: str, precision: str
) -> None:
    """A rank of 0 stands for a full update."""
    clients = tuple(f"c{index}" for index in range(len(ranks)))
    with job_folder(scenario) as job:
        proxies = job.export(job.model, "proxies", clients=clients)
        drafts: list[AdapterUpdate | Update] = [
            draft_adapters(proxies / f"c{i}", i, rank=rank, examples=3 + i, precision=precision)
            if rank
            else draft(proxies / f"c{i}", noise(i), examples=3 + i, precision=precision)
            for i, rank in enumerate(ranks)
        ]
        folders = [update.write(job.root / f"u{index}") for index, update in enumerate(drafts)]
        merge(
            str(job.model),
            folders,
            job.root / "next",
            key=job.key,
            ledger=job.root / "ledger.jsonl",
            normalize=normalize,
        )
        before, after = read_model(job.model), read_model(job.root / "next")
        names = [name for name, (dtype, _) in before.items() if dtype != "I64"]
        parts = [parts_of(proxies / f"c{index}", update, names) for index, update in enumerate(drafts)]
        for name in names:
            dtype, bits = before[name]
            old = to_floats(bits, dtype).astype(np.float64)
            wanted = fedavg(old, [part[name] for part in parts], [3 + i for i in range(len(ranks))], normalize, 1.0)
            error = {"F32": 2**-24, "F16": 2**-11, "BF16": 2**-8}[dtype]
            result = to_floats(after[name][1], dtype)
            assert (np.abs(result - wanted) <= np.abs(wanted) * error * 1.01 + 1e-7).all()
            seen = np.logical_or.reduce([part[name][1] for part in parts]).reshape(bits.shape)
            np.testing.assert_array_equal(after[name][1][~seen], bits[~seen])


# ---------------------------------------------------------------- one job


@pytest.fixture(scope="module")
def original(module_folder: Path) -> JobFolder:
    """A job with two proxies, and adapters for one of them."""
    job = JobFolder(
        Scenario("bert", "F32", 33, 48, 1, "neuron", "nf4", None, 64, False, "zero", 0.3, 0.2), module_folder
    )
    make_model(job.model, "bert", hidden=33)
    job.export(job.model, "proxies")
    return job


@pytest.fixture
def job(original: JobFolder, folder: Path) -> JobFolder:
    """A copy of it, to be changed."""
    return original.copied(folder / "job")


def merged(job: JobFolder, *folders: Path, out: str = "next", **options: Any) -> Any:
    usual = {"key": job.key, "ledger": job.root / "ledger.jsonl"}
    return merge(str(job.model), folders, job.root / out, **usual | options)


def test_chunks_change_no_byte(job: JobFolder) -> None:
    update = draft_adapters(job.root / "proxies/ann", 1, rank=5).write(job.root / "u")
    merged(job, update)
    with chunks_of(100):
        merged(job, update, out="again")
    assert contents(job.root / "next") == contents(job.root / "again")


def test_what_was_trained_in_full_beside_adapters_moves_as_in_a_full_update(job: JobFolder) -> None:
    proxy = job.root / "proxies/ann"
    update = draft_adapters(proxy, 1, saved=HEAD)
    full = draft(proxy, lambda name, shape: np.zeros(shape))
    full.tensors |= update.saved
    for name in update.manifest["adapters"]:
        shown = visible_elements(proxy)[name].reshape(read_model(job.model)[name][1].shape)
        u = update.product(name).astype(np.float32)
        whole = {"row": u[shown.any(axis=1)], "column": u[:, shown.any(axis=0)]}
        axis = json.loads((proxy / "proxy.json").read_bytes())["tensors"][name]["axis"]
        full.tensors[name] = ("F32", to_bits(whole[axis], "F32"))
    results = [merged(job, update.write(job.root / "u")), merged(job, full.write(job.root / "f"), out="other")]
    assert contents(job.root / "next") == contents(job.root / "other")
    assert results[0].clients == results[1].clients
    assert results[0].covered == results[1].covered


def test_tensors_without_an_adapter_count_as_trained_by_zero(job: JobFolder) -> None:
    proxies = job.root / "proxies"
    one = draft_adapters(proxies / "ann", 1, keep={WEIGHT: True}).write(job.root / "u-ann")
    other = draft_adapters(proxies / "bob", 2, keep={"classifier.weight": True}).write(job.root / "u-bob")
    alone, both = merged(job, one, out="alone"), merged(job, one, other)
    assert both.covered >= alone.covered > 0.4
    before, after = read_model(job.model)[WEIGHT][1], read_model(job.root / "next")[WEIGHT][1]
    shown = [visible_elements(proxies / name)[WEIGHT].reshape(before.shape).any(axis=1) for name in ("ann", "bob")]
    full = to_floats(read_model(job.root / "alone")[WEIGHT][1], "F32") - to_floats(before, "F32")
    step = to_floats(after, "F32") - to_floats(before, "F32")
    share = np.where(shown[1], 0.5, 1.0)[:, None]
    np.testing.assert_allclose(step, share * full, atol=1e-6)


# ---------------------------------------------------------------- kept as an adapter


def product_of(folder: Path, update: AdapterUpdate, name: str) -> Doubles:
    """Δ of a tensor according to an adapter that a merge kept."""
    record, factors = update.manifest["adapters"][name], read_file(folder / "adapter_model.safetensors")
    a, b = (to_floats(factors[f"{record['module']}.lora_{letter}.weight"][1], "F32") for letter in "AB")
    whole = b.astype(np.float64) @ a.astype(np.float64)
    return whole.T if record["transposed"] else whole


@few(10)
@given(
    st.sampled_from(["neuron", "input"]).flatmap(lambda axis: scenarios(axis=axis, dtype="F32")),
    st.sampled_from(["coverage", "clients"]),
)
def test_the_kept_adapter_is_the_step_of_the_merge(scenario: Scenario, normalize: str) -> None:
    with job_folder(scenario) as job:
        proxies = job.export(job.model, "proxies")
        drafts = [draft_adapters(proxies / name, rank, rank=rank) for name, rank in (("ann", 2), ("bob", 5))]
        folders = [update.write(job.root / f"u{number}") for number, update in enumerate(drafts)]
        kept = job.root / "adapter"
        result = merged(job, *folders, keep_adapter=kept, server_lr=0.5, normalize=normalize)
        assert (result.adapter.rank, result.adapter.summed_rank, result.adapter.error) == (7, 7, 0)
        before, after = read_model(job.model), read_model(job.root / "next")
        for name in drafts[0].manifest["adapters"]:
            old, new = (to_floats(model[name][1], "F32").astype(np.float64) for model in (before, after))
            step = product_of(kept, drafts[0], name)
            np.testing.assert_allclose(old + step, new, rtol=2e-6, atol=2e-6)
            np.testing.assert_array_equal(step[old == new], 0)


def test_a_smaller_rank_keeps_the_largest_singular_values(job: JobFolder) -> None:
    drafts = [draft_adapters(job.root / f"proxies/{name}", 1 + len(name), rank=3) for name in ("ann", "bob")]
    folders = [update.write(job.root / f"u{number}") for number, update in enumerate(drafts)]
    merged(job, *folders, keep_adapter=job.root / "whole")
    result = merged(job, *folders, out="n2", keep_adapter=job.root / "cut", adapter_rank=2)
    dropped = squares = 0.0
    for name in drafts[0].manifest["adapters"]:
        whole, cut = (product_of(job.root / folder, drafts[0], name) for folder in ("whole", "cut"))
        u, sizes, v = np.linalg.svd(whole, full_matrices=False)
        np.testing.assert_allclose(cut, (u[:, :2] * sizes[:2]) @ v[:2], atol=1e-5)
        assert not cut[~whole.any(axis=1)].any() and not cut[:, ~whole.any(axis=0)].any()
        dropped, squares = dropped + (sizes[2:] ** 2).sum(), squares + (sizes**2).sum()
    assert (result.adapter.rank, result.adapter.summed_rank) == (2, 6)
    assert result.adapter.error == pytest.approx(np.sqrt(dropped / squares), rel=1e-4)
    assert json.loads((job.root / "cut/adapter_config.json").read_text())["r"] == 2


def test_what_was_trained_in_full_is_in_the_kept_adapter_as_it_is_after_the_merge(job: JobFolder) -> None:
    update = draft_adapters(job.root / "proxies/ann", 1, saved=HEAD).write(job.root / "u")
    merged(job, update, keep_adapter=job.root / "adapter")
    kept, after = read_file(job.root / "adapter/adapter_model.safetensors"), read_model(job.root / "next")
    for name in HEAD:
        np.testing.assert_array_equal(kept[f"base_model.model.{name}"][1], after[name][1])
    assert json.loads((job.root / "adapter/adapter_config.json").read_text())["modules_to_save"] == ["classifier"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_adapter": "adapter"}, "the update of client 'bob' is not one of adapters"),
        ({"keep_adapter": "next/adapter"}, "is inside of"),
        ({"adapter_rank": 3}, "no adapter is written"),
        ({"keep_adapter": "adapter", "control": "u-bob"}, "a control cannot be part of an adapter"),
        ({"keep_adapter": "adapter", "rule": "median", "byzantine": 1}, "only a weighted average is an adapter"),
        ({"keep_adapter": "adapter", "clip_norm": 1.0}, "only a weighted average is an adapter"),
        (
            {"keep_adapter": "adapter", "server_optimizer": "adam", "server_lr": 0.001},
            "a step of adam is not an adapter",
        ),
    ],
)
def test_a_step_that_is_no_adapter_is_refused(job: JobFolder, options: dict[str, Any], message: str) -> None:
    one = draft_adapters(job.root / "proxies/ann", 1).write(job.root / "u-ann")
    other = send(job.root / "proxies/bob", job.root / "u-bob", noise(1, 0.01))
    paths = {
        name: job.root / value if name in ("keep_adapter", "control") else value for name, value in options.items()
    }
    with nothing_written(job.root), pytest.raises(FedqsnError, match=message):
        merged(job, one, other, **paths)


def test_clients_that_trained_different_modules_in_full_make_no_adapter(job: JobFolder) -> None:
    one = draft_adapters(job.root / "proxies/ann", 1, saved=HEAD).write(job.root / "u-ann")
    other = draft_adapters(job.root / "proxies/bob", 1).write(job.root / "u-bob")
    with nothing_written(job.root), pytest.raises(FedqsnError, match="trained different modules in full"):
        merged(job, one, other, keep_adapter=job.root / "adapter")


# ---------------------------------------------------------------- refused


def factor(update: AdapterUpdate, which: str) -> NDArray[np.float32]:
    """A factor of the adapter of WEIGHT, to change in job."""
    return update.factors[f"{update.manifest['adapters'][WEIGHT]['module']}.lora_{which}.weight"][1].view(np.float32)


def poke(which: str, value: float) -> Callable[[AdapterUpdate], object]:
    def change(update: AdapterUpdate) -> None:
        array = factor(update, which)
        array.reshape(-1)[np.flatnonzero(array.reshape(-1))[0]] = value

    return change


def record(**fields: Any) -> Callable[[AdapterUpdate], object]:
    return lambda update: update.manifest["adapters"][WEIGHT].update(fields)


def config(**fields: Any) -> Callable[[AdapterUpdate], object]:
    return lambda update: update.config.update(fields)


def hidden_row(update: AdapterUpdate) -> None:
    which = "A" if update.manifest["adapters"][WEIGHT]["transposed"] else "B"
    array = factor(update, which)
    rows = array.T if which == "A" else array
    rows[np.flatnonzero(~rows.any(axis=1))[0], 0] = 1e-20


def without(which: str) -> Callable[[AdapterUpdate], object]:
    return lambda update: update.factors.pop(f"{update.manifest['adapters'][WEIGHT]['module']}.lora_{which}.weight")


def reshaped(update: AdapterUpdate) -> None:
    name = f"{update.manifest['adapters'][WEIGHT]['module']}.lora_A.weight"
    dtype, bits = update.factors[name]
    update.factors[name] = (dtype, bits.T.copy())


def renamed(update: AdapterUpdate) -> None:
    update.manifest["adapters"]["nothing.weight"] = update.manifest["adapters"].pop(WEIGHT)


def bias(update: AdapterUpdate) -> None:
    update.manifest["adapters"][WEIGHT.replace("weight", "bias")] = update.manifest["adapters"].pop(WEIGHT)


def more(update: AdapterUpdate) -> None:
    update.factors["base_model.model.other"] = ("F32", np.zeros(3, np.uint32))


def both(update: AdapterUpdate) -> None:
    update.manifest["saved"] = {WEIGHT: "base_model.model.x.y"}
    update.config["modules_to_save"] = ["x"]
    update.saved[WEIGHT] = ("F32", np.zeros(3, np.uint32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (poke("A", float("nan")), "holds NaN or infinity"),
        (poke("B", float("inf")), "holds NaN or infinity"),
        (poke("A", 3e38), "summed exactly"),
        (hidden_row, "is not zero in hidden units"),
        (without("A"), "lora_A.weight: the tensor is missing"),
        (without("B"), "lora_B.weight: the tensor is missing"),
        (reshaped, r"expected F32 \[3, 33\], found F32 \[33, 3\]"),
        (renamed, "nothing.weight: the model has no such tensor"),
        (bias, "this tensor can have no adapter"),
        (more, "base_model.model.other: the model has no such tensor"),
        (both, "has an adapter and was trained in full"),
        (record(rank=0), "rank"),
        (record(rank=10**9), "contradicts update.json"),
        (lambda u: (record(rank=10**9)(u), config(r=10**9)(u)), "contradicts update.json"),
        (record(rank=10**10), "rank"),
        (record(scaling=1e30), "contradicts update.json"),
        (record(scaling=2.0 + 2**-40), "contradicts update.json"),
        (record(scaling=0.0), "scaling"),
        (record(scaling=float("nan")), "NaN"),
        (record(transposed=1), "transposed"),
        (record(module="x" * 2000), "module"),
        (record(more=1), "more"),
        (config(base_model_name_or_path="/etc/passwd"), "'base_model_name_or_path' has a value that no update has"),
        (config(revision="main"), "'revision' has a value"),
        (config(auto_mapping={"parent_library": "os"}), "'auto_mapping' has a value"),
        (config(peft_type="LOHA"), "'peft_type' has a value"),
        (config(use_dora=True), "'use_dora' has a value"),
        (config(rank_pattern={"x": 1}), "'rank_pattern' has a value"),
        (config(bias="all"), "'bias' has a value"),
        (config(megatron_core="../x"), "'megatron_core' has a value"),
        (config(init_lora_weights="/x"), "'init_lora_weights' has a value"),
        (config(task_type={}), "'task_type' has a value"),
        (config(r=0), "has no rank or no scale"),
        (config(r=10**300), "has no rank or no scale"),
        (config(r=True), "'r' has a value"),
        (config(lora_alpha=10**300), "'lora_alpha' has a value"),
        (config(lora_alpha=7.0), "contradicts update.json"),
        (config(use_rslora=True), "contradicts update.json"),
        (config(target_modules="all-linear"), "adapts other modules"),
        (config(target_modules=["x"]), "adapts other modules"),
        (config(modules_to_save=["classifier"]), "trains other modules in full"),
        (config(modules_to_save={}), "trains other modules in full"),
        (lambda u: u.manifest.update(precision="nf4"), "factors are never sent as nf4"),
        (lambda u: u.manifest.update(precision="bf16"), "expected BF16"),
        (lambda u: u.manifest.pop("adapters"), "must list exactly update.safetensors"),
        (lambda u: u.manifest.update(saved={"x": "y"}), "must list exactly"),
    ],
)
def test_a_hostile_adapter_is_refused_in_one_line(
    job: JobFolder, change: Callable[[AdapterUpdate], object], message: str
) -> None:
    update = draft_adapters(job.root / "proxies/ann", 1)
    change(update)
    folder = update.write(job.root / "u")
    with nothing_written(job.root), pytest.raises(FedqsnError, match=message) as caught:
        merged(job, folder)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_file_that_was_changed_on_the_way_is_refused(job: JobFolder, name: str) -> None:
    folder = draft_adapters(job.root / "proxies/ann", 1).write(job.root / "u")
    data = bytearray((folder / name).read_bytes())
    data[-3] ^= 1
    (folder / name).write_bytes(data)
    with nothing_written(job.root), pytest.raises(FedqsnError, match="its digest is not"):
        merged(job, folder)


def test_a_file_that_update_json_does_not_list_is_refused(job: JobFolder) -> None:
    folder = draft_adapters(job.root / "proxies/ann", 1).write(job.root / "u")
    shutil.copy(folder / "adapter_model.safetensors", folder / "update.safetensors")
    with nothing_written(job.root), pytest.raises(FedqsnError, match="'update.safetensors', which is not a file"):
        merged(job, folder)


def test_a_tensor_of_single_weights_can_have_no_adapter(folder: Path) -> None:
    job = JobFolder(Scenario("bert", "F32", 33, 48, 1, "element", "nf4", None, 64, False, "zero", 0.3, 0.2), folder)
    make_model(job.model, "bert", hidden=33)
    proxy = job.export(job.model, "proxies") / "ann"
    update = draft_adapters(proxy, 1, keep={WEIGHT: True}).write(folder / "u")
    with pytest.raises(FedqsnError, match="can have no adapter"):
        merged(job, update)
