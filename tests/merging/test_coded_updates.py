"""Updates of int8 and nf4 codes: merged as the values that the codes stand for, read slice by slice, and refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqsn_cli import merge
from fedqsn_cli.artifacts.update_folder import UPDATE_FORMATS, format_of, stored_specs
from fedqsn_cli.errors import RefusedUpdate
from fedqsn_cli.merging.updates.stored_values import StoredValues, UpdateSlice
from fedqsn_cli.quantization.runs import decode_run, encode_run
from support.helpers import Update, contents, draft, make_model, noise, nothing_written
from support.passes import chunks_of
from support.scenario import JobFolder, Scenario, few, job_folder, scenarios

USUAL = Scenario("bert", "F32", 33, 48, 1, "neuron", "nf4", None, 64, False, "zero", 0.3, 0.2)
WEIGHT, NORM = "bert.encoder.layer.0.intermediate.dense.weight", "bert.embeddings.LayerNorm.weight"


def coded(update: Update, shapes: dict[str, tuple[int, ...]], form: str) -> tuple[Update, Update]:
    """An fp32 update as codes, and the fp32 update of the values that they stand for."""
    codes, values = {}, {}
    for name, (dtype, bits) in update.tensors.items():
        stored = format_of(form, shapes[name])
        if stored.coding is None:
            codes[name] = values[name] = (dtype, bits)
            continue
        coding, flat = stored.coding, bits.view(np.float32).reshape(-1)
        packed, scales = encode_run(flat, coding.format, coding.block)
        first, second = stored_specs(name, stored, bits.shape)
        codes[name] = (first.dtype, packed.view(np.int8 if first.dtype == "I8" else np.uint8).reshape(first.shape))
        codes[second.name] = ("F32", scales.view(np.uint32))
        plain = decode_run(packed, scales, coding.format, coding.block, flat.size)
        values[name] = ("F32", plain.view(np.uint32).reshape(bits.shape))
    return Update(codes, update.manifest | {"precision": form}), Update(values, update.manifest)


def pair(proxy: Path, form: str, seed: int) -> tuple[Update, Update]:
    """A coded update for a proxy, and its values."""
    shapes: dict[str, tuple[int, ...]] = {}

    def values(name: str, shape: tuple[int, ...]) -> Any:
        shapes[name] = shape
        return noise(seed)(name, shape)

    return coded(draft(proxy, values), shapes, form)


@few(16)
@given(scenarios(shards=1), st.sampled_from(["int8", "nf4"]), st.sampled_from([1 << 20, 300]))
def test_codes_merge_to_the_same_bits_as_the_values_they_stand_for(scenario: Scenario, form: str, chunk: int) -> None:
    with job_folder(scenario) as job, chunks_of(chunk):
        proxies = job.export(job.model, "proxies")
        results = []
        for index, kind in enumerate(("codes", "values")):
            folders = [
                pair(proxies / name, form, seed)[index].write(job.root / f"{kind}-{name}")
                for seed, name in enumerate(("ann", "bob"))
            ]
            out = job.root / f"next-{kind}"
            merge(str(job.model), folders, out, key=job.key, ledger=job.root / "ledger.jsonl")
            results.append(contents(out))
        assert results[0] == results[1]


@few(60)
@given(st.integers(1, 900), st.data(), st.sampled_from(["int8", "nf4"]))
def test_a_slice_is_the_same_as_that_of_the_whole(size: int, data: st.DataObject, form: str) -> None:
    stored = UPDATE_FORMATS[form]
    assert stored.coding is not None
    x = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    codes, scales = encode_run(x, stored.coding.format, stored.coding.block)
    file = np.concatenate([np.zeros(8, np.uint8), scales.view(np.uint8), codes])
    place = StoredValues("w", stored, size, 8 + scales.nbytes, 8)
    first = data.draw(st.integers(0, size))
    count = data.draw(st.integers(0, size - first))
    run = UpdateSlice(0, 1, first, count, np.empty(0, np.int64))
    part = place.read(run, lambda _, start, length: file[start : start + length].copy())
    whole = decode_run(codes, scales, stored.coding.format, stored.coding.block, size)
    np.testing.assert_array_equal(part.values, whole[first : first + count])
    assert sum(piece.data.size for piece in part.pieces) <= 2 * count + 8 * math.ceil(count / 64) + 600


@pytest.fixture(scope="module")
def original(module_folder: Path) -> JobFolder:
    """A job with one proxy."""
    job = JobFolder(USUAL, module_folder / "job")
    make_model(job.model, "bert", hidden=33)
    job.export(job.model, "proxies", clients=("ann",))
    return job


def scale(value: float) -> Callable[[Update], None]:
    def change(update: Update) -> None:
        update.tensors[WEIGHT + ".absmax"][1].view(np.float32)[-1] = value

    return change


def put(name: str, tensor: Callable[[Any], tuple[str, Any]]) -> Callable[[Update], None]:
    return lambda update: update.tensors.update({name: tensor(update.tensors.get(name, ("F32", None))[1])})


FAULTS: dict[str, tuple[Callable[[Update], Any], str]] = {
    "a scale that is NaN": (scale(float("nan")), "block scale is NaN"),
    "an infinite scale": (scale(float("inf")), "block scale is NaN, infinite"),
    "a negative scale": (scale(-1.0), "negative"),
    "a huge scale": (scale(1e30), "summed exactly"),
    "no scales": (lambda update: update.tensors.pop(WEIGHT + ".absmax"), "missing"),
    "no codes": (lambda update: update.tensors.pop(WEIGHT), "missing"),
    "one scale more": (put(WEIGHT + ".absmax", lambda x: ("F32", np.append(x, np.uint32(0)))), "expected F32"),
    "scales of another dtype": (put(WEIGHT + ".absmax", lambda x: ("BF16", x.astype(np.uint16))), "expected F32"),
    "one code less": (put(WEIGHT, lambda x: ("U8", x.reshape(-1)[1:].view(np.uint8))), "expected"),
    "values": (put(WEIGHT, lambda x: ("F32", np.zeros(x.shape, np.uint32))), "expected"),
    "scales of a norm": (put(NORM + ".absmax", lambda x: ("F32", np.zeros(1, np.uint32))), "no such"),
    "NaN in a norm": (
        put(NORM, lambda x: ("F32", np.full_like(x, 0x7FC00000))),
        "NaN or infinity",
    ),
    "a precision that it is not": (lambda update: update.manifest.update(precision="fp32"), "expected F32"),
}


@pytest.mark.parametrize("form", ["int8", "nf4"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_malformed_coded_update_is_refused(original: JobFolder, folder: Path, fault: str, form: str) -> None:
    change, complaint = FAULTS[fault]
    update, _ = pair(original.root / "proxies/ann", form, 1)
    change(update)
    update.write(folder / "update")
    with nothing_written(folder), pytest.raises(RefusedUpdate, match=complaint) as caught:
        merge(
            str(original.model),
            [folder / "update"],
            folder / "next",
            key=original.key,
            ledger=original.root / "ledger.jsonl",
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_a_coded_update_with_another_digest_is_refused(original: JobFolder, folder: Path, form: str) -> None:
    update = pair(original.root / "proxies/ann", form, 1)[0].write(folder / "update")
    file = update / "update.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 16  # another code
    file.write_bytes(data)
    with pytest.raises(RefusedUpdate, match="its digest is not"):
        merge(str(original.model), [update], folder / "next", key=original.key, ledger=original.root / "ledger.jsonl")
