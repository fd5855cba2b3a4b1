"""Rows of a tensor, quantized as its layout says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.artifacts.manifests import Quantization
from fedqsn_cli.errors import InputError
from fedqsn_cli.quantization import kernels

if TYPE_CHECKING:
    from fedqsn_cli.models.tensor_task import TensorTask

Array = NDArray[Any]


def encode(
    task: TensorTask, quantization: Quantization | None, x: Array, owner: str = "model"
) -> tuple[Array, Array | None]:
    """Quantize rows of a tensor as its layout says: (values or codes, block scales of packed kinds).

    Args:
        owner: "model" or "public base", for errors.

    Raises:
        InputError: a value is not finite, or beyond the range of the format.
    """
    layout, dtype = task.layout, task.tensor.dtype
    if quantization is None or layout.kind == "raw":
        return x, None
    y = np.ascontiguousarray(x.T) if layout.transposed else x
    rows, cols = y.shape
    try:
        if layout.kind == "pack4":
            packed = np.empty((y.size + 1) // 2, np.uint8)
            absmax = np.empty(-(-y.size // quantization.block_size), np.float32)
            kernels.quantize_4bit(
                y, dtype, format=quantization.format, block=quantization.block_size, packed=packed, absmax=absmax
            )
            return packed, absmax
        if layout.kind == "pack8":
            codes, row_scales = np.empty((rows, cols), np.int8), np.empty(rows, np.float32)
            kernels.quantize_int8(y, dtype, codes, row_scales)
            return codes, row_scales
        return _snap(task, quantization, y), None
    except kernels.NonFinite:
        check_finite(task, x, owner)
        raise InputError(f"a value is NaN, infinite, or too large for {quantization.format}", where=task.name) from None


def _snap(task: TensorTask, quantization: Quantization, y: Array) -> Array:
    """Values rounded to the grid, in the layout in which they are stored."""
    out = np.empty_like(y)
    rows, cols = y.shape
    # int8 takes one scale a row, as bitsandbytes does; down columns, which may be long, one a block like all others
    by_block = quantization.format == "int8" and task.layout.geometry == "column"
    step = quantization.block_size if by_block else max(rows, 1)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        kernels.snap(
            y[part],
            task.tensor.dtype,
            format=quantization.format,
            block=quantization.block_size,
            geometry=task.layout.geometry,
            rows=len(y[part]),
            cols=cols,
            out=out[part],
        )
    return np.ascontiguousarray(out.T) if task.layout.transposed else out


def encode_with(task: TensorTask, quantization: Quantization, x: Array, scales: Array) -> Array:
    """Codes of other values under given block scales, clamped; for blocks that mix units."""
    y = np.ascontiguousarray(x.T) if task.layout.transposed else x
    if task.layout.kind == "pack4":
        packed = np.empty((y.size + 1) // 2, np.uint8)
        kernels.quantize_4bit_with(
            y,
            task.tensor.dtype,
            format=quantization.format,
            block=quantization.block_size,
            absmax_given=scales,
            packed=packed,
        )
        return packed
    wide = kernels.widened(y, task.tensor.dtype).reshape(y.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint(wide * (np.float32(127) / scales[:, None]))
    return np.where(scales[:, None] > 0, np.clip(codes, -127, 127), 0).astype(np.int8)


def check_finite(task: TensorTask, x: Array, owner: str) -> None:
    """Refuse values that are NaN or infinite. Raises InputError."""
    if task.tensor.is_float and not kernels.all_finite(x, task.tensor.dtype):
        raise InputError(f"the {owner} holds NaN or infinity where it is visible", where=task.name)
