"""How each tensor of an output is stored, and which stored tensors that makes.

    kind    what is written
    raw     the values as they are (norms, biases, buffers; everything when nothing is quantized)
    snap    values rounded to the grid of the format, in the model's own dtype
    pack4   4-bit codes and block scales, as bitsandbytes stores a linear layer
    pack8   int8 codes and row scales, as bitsandbytes stores a linear layer

Blocks are `flat` (C order over the matrix), along each `row`, or down each `column`; the last two never leave a unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from fedqsn_cli import validate
from fedqsn_cli.artifacts.manifests import Quantization
from fedqsn_cli.errors import InputError
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.planning.tensor_plan import TRANSPOSED, TensorPlan, UnitAxis, View
from fedqsn_cli.quantization.codebooks import FORMATS

Kind = Literal["raw", "snap", "pack4", "pack8"]
Geometry = Literal["flat", "row", "column"]


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """How one tensor is stored.

    Args:
        kind, geometry: see the table above.
        transposed: the matrix is worked on as [out, in], while the checkpoint holds [in, out] (Conv1D).
        view: (lead, rows, cols) of the matrix as it is worked on.
        axis: what a unit is in that view; None when the tensor has no units.
    """

    kind: Kind
    geometry: Geometry
    transposed: bool
    view: View
    axis: UnitAxis | None

    @property
    def packed(self) -> bool:
        """Is it stored as codes and block scales?"""
        return self.kind in {"pack4", "pack8"}

    def scale_block(self, block: int) -> int:
        """Elements that share a scale, in C order of the working view: a block, or a row of int8 codes."""
        return self.view[2] if self.kind == "pack8" else block

    def mixes_units(self, block: int) -> bool:
        """May elements of several units share a scale?"""
        return self.axis != "row" or self.view[2] % self.scale_block(block) != 0

    def working(self, mask: UnitMask) -> UnitMask:
        """A mask of the stored tensor, as a mask of the matrix that is worked on."""
        return mask.transposed() if self.transposed else mask


def quantization(format: str, *, block_size: int, double_quant: bool, layout: str | None) -> Quantization | None:
    """Check the options of a quantization and fill in the layout. None stands for format `none`.

    Raises:
        InputError: the options do not go together.
    """
    validate.choice(format, tuple(FORMATS), "--format")
    validate.block_size(block_size, "--block-size")
    if layout is not None:
        validate.choice(layout, ("bnb", "dense"), "--layout")
    packable = format in {"nf4", "fp4", "int8"}
    if layout == "bnb" and not packable:
        raise InputError(f"format {format} has no bitsandbytes layout", where="--layout", hint="use --layout dense")
    if double_quant and (format not in {"nf4", "fp4"} or layout == "dense"):
        raise InputError("double quantization needs nf4 or fp4 in layout bnb", where="--double-quant")
    if format == "none":
        return None
    chosen = layout or ("bnb" if packable else "dense")
    return Quantization.model_validate(
        {"format": format, "block_size": block_size, "double_quant": double_quant, "layout": chosen}
    )


def layout_of(tensor: TensorPlan, how: Quantization | None) -> TensorLayout:
    """Decide how one tensor of the plan is stored."""
    axis = tensor.axis
    if how is None or not tensor.quantized:
        return TensorLayout("raw", "flat", False, tensor.view, axis)
    if how.layout == "bnb" and tensor.packable:
        kind: Kind = "pack8" if how.format == "int8" else "pack4"
    else:
        kind = "snap"
    if tensor.role == "conv1d":
        lead, rows, cols = tensor.view
        return TensorLayout(kind, "flat", True, (lead, cols, rows), None if axis is None else TRANSPOSED[axis])
    if tensor.role == "linear":
        return TensorLayout(kind, "flat", False, tensor.view, axis)
    if tensor.role in {"embedding", "head", "router"} or axis == "column":
        return TensorLayout(kind, "column", False, tensor.view, axis)
    return TensorLayout(kind, "row", False, tensor.view, axis)


def row_chunks(storage: TensorLayout, block: int, elements: int) -> Iterator[tuple[int, int]]:
    """Cut a matrix into runs of whole rows: (first row, rows), of about `elements` elements.

    No run splits a block or a byte of codes, and none leaves a lead slice where blocks or units run down columns.
    """
    lead, rows, cols = storage.view
    if storage.transposed:  # its rows are the columns of the checkpoint, so it is read whole
        yield 0, rows
        return
    sliced = storage.axis == "column" or storage.geometry == "column"
    count = rows_at_a_time(storage, block, elements)
    for part in range(lead if sliced else 1):
        start, stop = (part * rows, (part + 1) * rows) if sliced else (0, lead * rows)
        for first in range(start, stop, count):
            yield first, min(count, stop - first)


def rows_at_a_time(storage: TensorLayout, block: int, elements: int) -> int:
    """Rows of a run of about `elements` elements that splits no block and no byte of codes."""
    cols, step = storage.view[2], 1
    if storage.kind != "raw":
        step = block if storage.geometry == "column" else block // math.gcd(cols or 1, block)
    if storage.kind == "pack8" or (storage.kind == "snap" and storage.geometry == "row"):
        step = 1
    return max(step, elements // max(cols, 1) // step * step)


def clear_shares(tensors: Sequence[TensorPlan], how: Quantization | None) -> dict[str, float]:
    """Share of all parameters that an output shows masked or not, quantized or not (0 to 1 each, 1 in sum)."""
    sizes = {"masked_quantized": 0, "masked_only": 0, "quantized_only": 0, "clear": 0}
    for tensor in tensors:
        quantized = how is not None and tensor.quantized
        if tensor.masked:
            kind = "masked_quantized" if quantized else "masked_only"
        else:
            kind = "quantized_only" if quantized else "clear"
        sizes[kind] += math.prod(tensor.shape)
    total = max(1, sum(sizes.values()))
    return {kind: size / total for kind, size in sizes.items()}
