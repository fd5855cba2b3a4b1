"""Packed tensors are named, shaped and described as transformers and bitsandbytes do it, and read back strictly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import QuantState
from numpy.typing import NDArray
from safetensors.numpy import save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
)

from fedqsn_cli.checkpoint import Checkpoint
from fedqsn_cli.errors import FormatError
from fedqsn_cli.quantization import kernels
from fedqsn_cli.quantization.bnb_format import companion_arrays, companion_specs, quantization_config
from fedqsn_cli.quantization.bnb_reader import find_packings, read_scales
from fedqsn_cli.quantization.scales import Scales
from support.hardware import fused_dynamic_map
from support.reference import bits, normals

Array = NDArray[Any]

CASES = {"nf4": ("nf4", False), "fp4": ("fp4", False), "nf4-double": ("nf4", True), "int8": ("int8", False)}
WEIGHT = "bert.encoder.layer.0.intermediate.dense.weight"
SKIP = ["classifier"]


def bnb_config(format: str, double: bool) -> BitsAndBytesConfig:
    if format == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=SKIP)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=format,
        bnb_4bit_use_double_quant=double,
        llm_int8_skip_modules=SKIP,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


@pytest.fixture(autouse=True, scope="module")
def fused_map() -> Iterator[None]:
    with fused_dynamic_map():
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small BERT as transformers saves it: dense in bf16, and quantized by bitsandbytes in every way."""
    folder = tmp_path_factory.mktemp("bnb")
    config = BertConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=96,
        vocab_size=50,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).to(torch.bfloat16).save_pretrained(folder / "dense")
    for case, (format, double) in CASES.items():
        model = AutoModelForSequenceClassification.from_pretrained(
            folder / "dense", quantization_config=bnb_config(format, double), dtype=torch.bfloat16
        )
        model.save_pretrained(folder / case)
    return {path.name: path for path in folder.iterdir()}


def pack(x: Array, dtype: str, format: str, double: bool, block: int = 64) -> tuple[Array, Scales]:
    """A matrix as our kernels pack it."""
    if format == "int8":
        codes, scb = np.empty(x.shape, np.int8), np.empty(x.shape[0], np.float32)
        kernels.quantize_int8(x, dtype, codes, scb)
        return codes, Scales(format, 0, scb)
    packed, absmax = np.empty(-(-x.size // 2), np.uint8), np.empty(-(-x.size // block), np.float32)
    kernels.quantize_4bit(x, dtype, format=format, block=block, packed=packed, absmax=absmax)
    return packed.reshape(-1, 1), Scales.of(format, block, absmax, double=double)


@pytest.mark.parametrize("case", CASES)
def test_every_stored_tensor_equals_what_transformers_saves(case: str, saved: dict[str, Path]) -> None:
    format, double = CASES[case]
    dense, theirs = Checkpoint.open(saved["dense"]), Checkpoint.open(saved[case])
    packings = find_packings(theirs)
    assert len(packings) == 7  # six layers of the encoder, and the pooler
    for name, packing in packings.items():
        entry = dense.entries[name]
        assert (packing.dtype, packing.shape, packing.format, packing.double) == ("BF16", entry.shape, format, double)
        codes, scales = pack(dense.read(name), "BF16", format, double)
        ours = {name: codes} | companion_arrays(name, entry.shape, "BF16", scales)
        specs = companion_specs(name, entry.shape, "BF16", format, 64, double)
        assert {spec.name for spec in specs} == set(ours) == {name, *packing.companions}
        for spec in specs:
            stored = theirs.entries[spec.name]
            assert ours[spec.name].nbytes == spec.nbytes
            text, data = theirs.read(spec.name).tobytes(), ours[spec.name].tobytes()
            if spec.name.endswith(f"bitsandbytes__{format}"):
                assert data.rstrip(b" ") == text
            else:
                assert (spec.dtype, spec.shape, data) == (stored.dtype, stored.shape, text)


@pytest.mark.parametrize("case", CASES)
def test_scales_that_transformers_saved_are_read_as_bitsandbytes_uses_them(case: str, saved: dict[str, Path]) -> None:
    format, double = CASES[case]
    dense, theirs = Checkpoint.open(saved["dense"]), Checkpoint.open(saved[case])
    scales = read_scales(theirs, WEIGHT)
    ours = pack(dense.read(WEIGHT), "BF16", format, double)[1]
    assert bits(scales.absmax) == bits(ours.absmax)
    assert (scales.nested is None) == (not double)


@pytest.mark.parametrize("case", CASES)
def test_quantization_config_equals_what_transformers_writes(case: str, saved: dict[str, Path]) -> None:
    format, double = CASES[case]
    theirs = json.loads((saved[case] / "config.json").read_text())["quantization_config"]
    if format == "int8":
        theirs["bnb_4bit_compute_dtype"] = "float32"
    assert quantization_config(format, 64, double, SKIP, "BF16") == theirs


def test_json_is_as_long_as_planned_whatever_the_offset() -> None:
    for offset in (0.0, 1e-45, 3.4028234663852886e38, 0.052276611328125):
        absmax = np.full(4, offset, np.float32) / np.float32(4) * np.float32(4)
        scales = Scales.of("nf4", 64, np.minimum(absmax, np.float32(8e37)), double=True)
        arrays = companion_arrays("w", (4, 64), "F16", scales)
        for spec in companion_specs("w", (4, 64), "F16", "nf4", 64, True)[1:]:
            assert arrays[spec.name].nbytes == spec.nbytes


def test_bitsandbytes_reads_padded_json() -> None:
    x = normals(64 * 64, "F32").reshape(64, 64)
    codes, scales = pack(x, "F32", "nf4", True)
    arrays = companion_arrays("w", x.shape, "F32", scales)
    state = QuantState.from_dict(
        {name.removeprefix("w."): torch.from_numpy(array.copy()) for name, array in arrays.items()}, torch.device("cpu")
    )
    assert tuple(state.shape) == x.shape
    assert state.offset.item() == scales.nested.offset  # type: ignore[union-attr]


def test_scaling_moves_into_the_scales_and_keeps_codes() -> None:
    x = normals(64 * 64, "F32").reshape(64, 64)
    factor = np.float32(10 / 7)
    for double in (False, True):
        scales = pack(x, "F32", "nf4", double)[1]
        scaled = scales.times(factor)
        assert np.allclose(scaled.absmax, scales.absmax * factor, rtol=3e-7)
        if double:
            assert scaled.nested is not None and scales.nested is not None
            assert bits(scaled.nested.codes) == bits(scales.nested.codes)


@pytest.mark.parametrize("double", [False, True])
def test_unseen_scales_say_nothing_about_the_tensor(double: bool) -> None:
    absmax = np.abs(normals(1000, "F32"))
    other = absmax.copy()
    unseen = np.arange(1000) % 3 == 0
    scales = Scales.of("nf4", 64, absmax, double=double)
    other[unseen] = 0.5
    base = Scales("nf4", 64, other)
    for chosen, wanted in ((scales.without(unseen, None), None), (scales.without(unseen, base), 0.5)):
        assert bits(chosen.absmax[~unseen]) == bits(scales.absmax[~unseen])
        if double:
            assert chosen.nested is not None
            assert len(set(chosen.nested.codes[unseen][:85].tolist())) == 1  # blocks of 256 share one nested scale
        else:
            assert set(chosen.absmax[unseen].tolist()) == {wanted or 0.0}


@pytest.fixture
def parts() -> dict[str, Array]:
    codes, scales = pack(normals(64 * 8, "F32").reshape(8, 64), "F32", "nf4", True)
    return {"l.weight": codes} | companion_arrays("l.weight", (8, 64), "F32", scales)


STATE = "l.weight.quant_state.bitsandbytes__nf4"


def reread(parts: dict[str, Array], tmp_path: Path) -> None:
    save_file({name: array.copy() for name, array in parts.items()}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    for name in find_packings(checkpoint):
        read_scales(checkpoint, name)


def text(**changes: Any) -> Array:
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "float32",
        "shape": [8, 64],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": 0.5,
    }
    kept = {key: value for key, value in (state | changes).items() if value is not None}
    return np.frombuffer(json.dumps(kept).encode(), np.uint8)


def test_what_we_write_is_read(parts: dict[str, Array], tmp_path: Path) -> None:
    reread(parts, tmp_path)


@pytest.mark.parametrize(
    "state",
    [
        text(quant_type="fp4"),
        text(blocksize=48),
        text(blocksize="64"),
        text(dtype="float64"),
        text(dtype=None),
        text(shape=[8, 65]),
        text(shape=[8, -64]),
        text(shape=[]),
        text(shape=[8.0, 64]),
        text(shape=[True, 512]),
        text(nested_offset=None),
        text(nested_offset=1),
        text(nested_offset=1e300),
        text(nested_blocksize=128),
        text(nested_dtype="float16"),
        text(extra=1),
        np.frombuffer(b"[]", np.uint8),
        np.frombuffer(b"{}x", np.uint8),
        np.frombuffer(b'{"shape": 1, "shape": 1}', np.uint8),
        np.frombuffer(b"\xff", np.uint8),
        np.frombuffer(b"[" * 1000, np.uint8),
        np.frombuffer(b" " * 2000, np.uint8),
        text(nested_offset=None, nested_dtype=None, nested_blocksize=None),
    ],
)
def test_json_of_another_kind_is_refused(state: Array, parts: dict[str, Array], tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        reread(parts | {STATE: state}, tmp_path)


@pytest.mark.parametrize("missing", ["l.weight", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"])
def test_a_missing_part_is_refused(missing: str, parts: dict[str, Array], tmp_path: Path) -> None:
    name = next(name for name in parts if name.endswith(missing))
    del parts[name]
    with pytest.raises(FormatError):
        reread(parts, tmp_path)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        (".absmax", np.zeros(9, np.uint8)),
        (".absmax", np.zeros(8, np.float32)),
        ("l.weight", np.zeros(256, np.uint8)),
        (".quant_map", np.zeros(16, np.float32)),
        (".nested_absmax", np.array([np.nan], np.float32)),
        (".nested_absmax", np.array([-1], np.float32)),
        (".nested_quant_map", np.full(256, np.nan, np.float32)),
        (".nested_quant_map", np.full(256, 2, np.float32)),
    ],
)
def test_a_part_that_bitsandbytes_would_not_write_is_refused(
    part: str, value: Array, parts: dict[str, Array], tmp_path: Path
) -> None:
    name = next(name for name in parts if name.endswith(part))
    with pytest.raises(FormatError):
        reread(parts | {name: value}, tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"l.SCB": np.zeros(3, np.float32)},
        {"l.SCB": np.full(2, np.nan, np.float32)},
        {"l.weight_format": np.ones((), np.uint8)},
        {"l.weight_format": np.zeros(1, np.uint8)},
        {"l.weight": np.zeros((2, 4), np.uint8)},
    ],
)
def test_a_malformed_int8_tensor_is_refused(wrong: dict[str, Array], tmp_path: Path) -> None:
    codes, scb, flag = np.zeros((2, 4), np.int8), np.zeros(2, np.float32), np.zeros((), np.uint8)
    good = {"l.weight": codes, "l.SCB": scb, "l.weight_format": flag}
    reread(good, tmp_path)
    with pytest.raises(FormatError):
        reread(good | wrong, tmp_path)
