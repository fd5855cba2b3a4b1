"""How tensors are stored: options of a quantization, kinds and geometries, runs of rows, shares."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqsn_cli.errors import InputError
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.planning.plan import make_plan
from fedqsn_cli.quantization.layout import TensorLayout, clear_shares, layout_of, quantization, row_chunks
from support.helpers import SHAPES, make_config
from support.scenario import few

USUAL: dict[str, Any] = {"block_size": 64, "double_quant": False, "layout": None}


def plans(family: str, axis: str = "neuron") -> dict[str, Any]:
    shapes = {name: ("BF16", shape) for name, shape in SHAPES[family][0](64, 128, 41).items()}
    return {tensor.name: tensor for tensor in make_plan(shapes, make_config(family), axis=axis).tensors}


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_formats_of_bitsandbytes_are_packed_unless_asked_otherwise(format: str) -> None:
    how = quantization(format, **USUAL)
    assert how is not None and how.layout == "bnb"
    how = quantization(format, **USUAL | {"layout": "dense"})
    assert how is not None and how.layout == "dense"


@pytest.mark.parametrize("format", ["nf3", "nf2"])
def test_our_own_formats_are_dense(format: str) -> None:
    how = quantization(format, **USUAL)
    assert how is not None and how.layout == "dense"


def test_format_none_quantizes_nothing() -> None:
    assert quantization("none", **USUAL) is None


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("nf5", {}),
        ("NF4", {}),
        ("", {}),
        ("nf4", {"block_size": 63}),
        ("nf4", {"block_size": 16}),
        ("nf4", {"block_size": 8192}),
        ("nf4", {"block_size": -64}),
        ("nf4", {"layout": "gguf"}),
        ("nf3", {"layout": "bnb"}),
        ("none", {"layout": "bnb"}),
        ("none", {"double_quant": True}),
        ("int8", {"double_quant": True}),
        ("nf2", {"double_quant": True}),
        ("nf4", {"double_quant": True, "layout": "dense"}),
    ],
)
def test_options_that_do_not_go_together_are_refused(format: str, options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        quantization(format, **USUAL | options)


AT = "bert.encoder.layer.0."
KINDS: list[tuple[str, str, str, str | None, str, str, bool]] = [
    # family, tensor, format, layout, kind, geometry, turned
    ("bert", AT + "output.dense.weight", "nf4", "bnb", "pack4", "flat", False),
    ("bert", AT + "output.dense.weight", "int8", "bnb", "pack8", "flat", False),
    ("bert", AT + "output.dense.weight", "nf4", "dense", "snap", "flat", False),
    ("bert", AT + "output.dense.bias", "nf4", "bnb", "raw", "flat", False),
    ("bert", "bert.embeddings.LayerNorm.weight", "nf4", "bnb", "raw", "flat", False),
    ("bert", "bert.embeddings.word_embeddings.weight", "nf4", "bnb", "snap", "column", False),
    ("bert", "classifier.weight", "nf4", "bnb", "snap", "column", False),
    ("bert", AT + "output.dense.weight", "none", None, "raw", "flat", False),
    ("gpt2", "transformer.h.0.mlp.c_fc.weight", "nf4", "bnb", "pack4", "flat", True),
    ("gpt2", "transformer.h.0.mlp.c_fc.weight", "nf3", "dense", "snap", "flat", True),
    ("t5", "encoder.block.0.layer.1.DenseReluDense.wo.weight", "nf4", "bnb", "snap", "flat", False),
    ("mixtral", "model.layers.0.block_sparse_moe.experts.0.w1.weight", "nf4", "bnb", "snap", "row", False),
    ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", "nf4", "bnb", "snap", "column", False),
    ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj", "nf4", "bnb", "snap", "column", False),
]


@pytest.mark.parametrize(("family", "name", "format", "layout", "kind", "geometry", "turned"), KINDS)
def test_each_role_has_its_kind_and_geometry(
    family: str, name: str, format: str, layout: str | None, kind: str, geometry: str, turned: bool
) -> None:
    storage = layout_of(plans(family)[name], quantization(format, **USUAL | {"layout": layout}))
    assert (storage.kind, storage.geometry, storage.transposed) == (kind, geometry, turned)


@pytest.mark.parametrize("axis", ["neuron", "input"])
@pytest.mark.parametrize("family", sorted(SHAPES))
def test_a_snapped_tensor_outside_of_linear_layers_never_mixes_units_in_a_block(family: str, axis: str) -> None:
    how = quantization("nf3", **USUAL)
    for tensor in plans(family, axis).values():
        storage = layout_of(tensor, how)
        if storage.kind == "snap" and tensor.role not in {"linear", "conv1d"}:
            assert storage.geometry == storage.axis


STORAGES = st.builds(
    lambda kind, geometry, view, axis: TensorLayout(kind, geometry, False, view, axis),
    st.sampled_from(["raw", "snap", "pack4", "pack8"]),
    st.sampled_from(["flat", "row", "column"]),
    st.tuples(st.integers(1, 3), st.integers(1, 200), st.integers(1, 70)),
    st.sampled_from(["row", "column", "element", None]),
)


def is_possible(storage: TensorLayout) -> bool:
    """What layout_of can give: packed tensors are plain matrices with flat blocks, columns do not mix with rows."""
    lead = storage.view[0]
    if storage.packed:
        return lead == 1 and storage.geometry == "flat"
    if storage.kind == "raw" or storage.geometry == "flat":
        return storage.geometry == "flat" and (lead == 1 or storage.kind == "raw")
    return True


@few(400)
@given(STORAGES.filter(is_possible), st.sampled_from([32, 64, 256]), st.integers(1, 20_000))
def test_runs_of_rows_cover_a_tensor_once_and_split_neither_blocks_nor_bytes(
    storage: TensorLayout, block: int, elements: int
) -> None:
    lead, rows, cols = storage.view
    chunks = list(row_chunks(storage, block, elements))
    assert [first for first, _ in chunks] == [0, *np.cumsum([count for _, count in chunks])[:-1]]
    assert sum(count for _, count in chunks) == lead * rows
    for first, count in chunks:
        end = first + count
        if storage.axis == "column" or storage.geometry == "column":
            assert first // rows == (end - 1) // rows  # in one slice
        if storage.kind == "snap" and storage.geometry == "column":
            assert first % rows % block == 0
        if storage.kind == "pack4":
            assert first * cols % 2 == 0
        if storage.kind in {"pack4", "snap"} and storage.geometry == "flat":
            assert first * cols % block == 0
        step = block if storage.geometry == "column" else block // math.gcd(cols, block)
        assert count * cols <= max(elements, step * cols)


def test_a_matrix_that_is_turned_comes_in_one_piece() -> None:
    storage = TensorLayout("pack4", "flat", True, (1, 300, 200), "row")
    assert list(row_chunks(storage, 64, 1)) == [(0, 300)]


@few(200)
@given(
    st.sampled_from(["row", "column", "element"]),
    st.integers(2, 9),
    st.integers(1, 200),
    st.sampled_from([32, 64]),
    st.sampled_from(["pack4", "pack8"]),
)
def test_what_is_said_not_to_mix_units_does_not(axis: Any, rows: int, cols: int, block: int, kind: Any) -> None:
    storage = TensorLayout(kind, "flat", False, (1, rows, cols), axis)
    if not storage.mixes_units(block):
        one = UnitMask.from_groups("row", storage.view, [np.arange(rows) == 1])
        full = one.full_blocks(storage.scale_block(block))
        flat = np.repeat(np.arange(rows) == 1, cols)
        size = storage.scale_block(block)
        touched = [bool(flat[start : start + size].any()) for start in range(0, flat.size, size)]
        assert full.tolist() == touched


@pytest.mark.parametrize("family", sorted(SHAPES))
def test_shares_sum_to_one_and_nothing_quantized_is_called_clear(family: str) -> None:
    tensors = list(plans(family).values())
    total = sum(math.prod(tensor.shape) for tensor in tensors)
    quantized = clear_shares(tensors, quantization("nf4", **USUAL))
    plain = clear_shares(tensors, None)
    assert sum(quantized.values()) == pytest.approx(1) == sum(plain.values())
    assert plain["masked_quantized"] == plain["quantized_only"] == 0
    clear = sum(math.prod(tensor.shape) for tensor in tensors if not tensor.masked and not tensor.quantized)
    assert quantized["clear"] == pytest.approx(clear / total)
    assert quantized["clear"] < 0.2
