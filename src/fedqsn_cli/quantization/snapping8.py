"""Values rounded to int8's grid and stored as values again: rows or columns that share one scale.

    v' = round(v * (127 * (1 / absmax))) * absmax * fp32(1 / 127)

is computed as in codes8.py, without the cast to fp16. Scales near the ends of fp32 are moved by a power of two first,
so that no step overflows or loses bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.quantization.codes8 import INVERSE, ROUNDER
from fedqsn_cli.quantization.jit import (
    INFINITY,
    NonFinite,
    as_bits,
    kernel,
    largest,
    narrow,
    plain_zeros,
    to_bits,
    to_float,
    widen,
)
from fedqsn_cli.quantization.threads import run_ranges

Array = NDArray[Any]
Float32s = NDArray[np.float32]

LIMIT = np.float32(127)


def column_absmax(x: Array, dtype: str, *, rows: int, cols: int, out: Float32s) -> None:
    """out[c] = the larger of out[c] and the largest magnitude in column c: called for every chunk, from zeros.

    Args:
        x: rows * cols values in C order; F32, F16 or BF16 (16-bit floats as uint16).
        out: fp32 [cols].

    Raises:
        NonFinite: a value is NaN or infinite.
    """
    source, kind = as_bits(x, dtype)
    if out.dtype != np.float32 or out.shape != (cols,) or source.size != rows * cols:
        raise ValueError(f"the arrays do not hold {rows} x {cols} values and {cols} scales")
    _column_absmax(source.reshape(rows, cols), kind, out.view(np.uint32))
    if not np.isfinite(out).all():
        raise NonFinite("a value is NaN or infinite")


def snap_int8(
    source: Array, reference: Array, out: Array, kind: int, shape: tuple[int, int], geometry: str,
    absmax: Float32s | None,
) -> None:  # fmt: skip
    """What `snap_with` does for int8; source, reference and out are flat bits of matrices of `shape`."""
    rows, cols = shape
    matrices = source.reshape(shape), reference.reshape(shape), out.reshape(shape)
    by_column = geometry == "column"
    flaws: list[int] = []
    if by_column:
        if absmax is None:
            absmax = np.zeros(cols, np.float32)
            _column_absmax(matrices[1], kind, absmax.view(np.uint32))
        if absmax.dtype != np.float32 or absmax.shape != (cols,):
            raise ValueError(f"{cols} columns need as many scales")
        factors = _factors(absmax)

    def work(first: int, stop: int) -> None:
        x, scale_x, y = (matrix[first:stop] for matrix in matrices)
        if not (_snap_columns(x, kind, factors, y) if by_column else _snap_rows(x, scale_x, y, kind)):
            flaws.append(first)

    run_ranges(rows, 16, work)
    if flaws or (absmax is not None and not np.isfinite(absmax).all()):
        raise NonFinite("a value is NaN or infinite")


@kernel
def _column_absmax(source: Any, kind: int, out: Any) -> None:
    bits = np.empty(source.shape[1], np.uint32)
    for row in range(source.shape[0]):
        widen(source[row], kind, bits)
        for i in range(bits.size):
            magnitude = np.uint32(bits[i] & np.uint32(0x7FFFFFFF))
            out[i] = magnitude if magnitude > out[i] else out[i]


@kernel
def _shift(absmax: Any) -> Any:
    """The power of two that brings a scale to where neither its reciprocal nor 127 times it overflows."""
    if absmax < np.float32(2.0**-100):
        return np.float32(2.0**100)
    return np.float32(2.0**-10) if absmax > np.float32(2.0**100) else np.float32(1)


@kernel
def _factors(absmax: Any) -> Any:
    """For each scale: the shift, what a shifted value is multiplied by, the shifted scale, and the shift back."""
    up, factor = np.empty(absmax.size, np.float32), np.zeros(absmax.size, np.float32)
    scale, down = np.empty(absmax.size, np.float32), np.empty(absmax.size, np.float32)
    for i in range(absmax.size):
        up[i] = _shift(absmax[i])
        down[i] = np.float32(1) / up[i]
        scale[i] = absmax[i] * up[i]
        if scale[i] > 0:
            factor[i] = (np.float32(1) / scale[i]) * np.float32(127)
    return up, factor, scale, down


@kernel
def _level(value: Any, up: Any, factor: Any, scale: Any, down: Any) -> Any:
    """Bits of the value that stands on the grid."""
    code = min(max((value * up) * factor, -LIMIT), LIMIT)
    code = (code + ROUNDER) - ROUNDER
    return to_bits((code * scale) * INVERSE * down)


@kernel
def _snap_columns(source: Any, kind: int, factors: Any, out: Any) -> bool:
    up, factor, scale, down = factors
    bits = np.empty(source.shape[1], np.uint32)
    fine = True
    for row in range(source.shape[0]):
        widen(source[row], kind, bits)
        fine &= largest(bits) < INFINITY
        for i in range(bits.size):
            bits[i] = _level(to_float(bits[i]), up[i], factor[i], scale[i], down[i])
        narrow(bits, kind, out[row])
        plain_zeros(out[row])
    return fine


@kernel
def _snap_rows(source: Any, reference: Any, out: Any, kind: int) -> bool:
    bits = np.empty(source.shape[1], np.uint32)
    absmax = np.empty(1, np.float32)
    fine = True
    for row in range(source.shape[0]):
        widen(reference[row], kind, bits)
        top = largest(bits)
        widen(source[row], kind, bits)
        fine &= max(top, largest(bits)) < INFINITY
        absmax[0] = to_float(top)
        ups, factors, scales, downs = _factors(absmax)
        up, factor, scale, down = ups[0], factors[0], scales[0], downs[0]
        for i in range(bits.size):
            bits[i] = _level(to_float(bits[i]), up, factor, scale, down)
        narrow(bits, kind, out[row])
        plain_zeros(out[row])
    return fine
