"""Values rounded to int8's grid and stored as values again: rows or columns that share one scale.

    v' = round(v * (127 * (1 / absmax))) * absmax * fp32(1 / 127)

is computed as in codes8.py, without the cast to fp16. Scales near the ends of fp32 are moved by a power of two first,
so that no step overflows or loses bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.kernels.floats import PIECE, Floats
from fedqsn_cli.kernels.jit import NonFinite, kernel
from fedqsn_cli.quantization.blocks import largest
from fedqsn_cli.quantization.codes8 import INVERSE, ROUNDER

Float32s = NDArray[np.float32]

LIMIT = np.float32(127)


def column_scales(source: Floats, cols: int) -> Float32s:
    """What `snap_table_int8` needs to know of each column of a matrix: fp32 [4, cols].

    Raises:
        NonFinite: a value is NaN or infinite.
    """
    table = np.empty((4, cols), np.float32)
    _factors(_column_absmax(source, cols), table)
    return table


def _column_absmax(source: Floats, cols: int) -> Float32s:
    """The largest magnitude in each column. Raises NonFinite."""
    absmax = np.zeros(cols, np.float32)
    size = max(1, PIECE // cols) * cols
    scratch = source.scratch(size)
    for first in range(0, source.size, size):
        values = source.read(first, min(first + size, source.size), scratch).reshape(-1, cols)
        np.maximum(absmax, np.abs(values).max(axis=0), out=absmax)  # NaN stays NaN
    if not np.isfinite(absmax).all():
        raise NonFinite("a value is NaN or infinite")
    return absmax


@kernel
def _factors(absmax: Any, table: Any) -> None:
    """Fill the table of `column_scales`.

    For each scale: the power of two that keeps its reciprocal and 127 times it in range, what a shifted value is
    multiplied by, the shifted scale, and the shift back.
    """
    for i in range(absmax.size):
        shift = np.float32(1)
        if absmax[i] < np.float32(2.0**-100):
            shift = np.float32(2.0**100)
        elif absmax[i] > np.float32(2.0**100):
            shift = np.float32(2.0**-10)
        scale = absmax[i] * shift
        table[0, i] = shift
        table[1, i] = (np.float32(1) / scale) * np.float32(127) if scale > 0 else np.float32(0)
        table[2, i] = scale
        table[3, i] = np.float32(1) / shift


@kernel
def _on_grid(value: Any, up: Any, factor: Any, scale: Any, down: Any) -> Any:
    code = min(max((value * up) * factor, -LIMIT), LIMIT)
    code = (code + ROUNDER) - ROUNDER
    return (code * scale) * INVERSE * down + np.float32(0)


@kernel
def snap_table_int8(values: Any, table: Any, out: Any) -> bool:
    """Whole rows; column c has the scale of table[:, c]. Returns False if a value is not finite."""
    fine = largest(values) < np.float32(np.inf)
    cols = table.shape[1]
    up, factor, scale, down = table[0], table[1], table[2], table[3]
    for start in range(0, values.size, cols):
        line, target = values[start : start + cols], out[start : start + cols]
        for i in range(cols):
            target[i] = _on_grid(line[i], up[i], factor[i], scale[i], down[i])
    return bool(fine)


@kernel
def snap_rows_int8(values: Any, cols: int, out: Any) -> bool:
    """Whole rows, each with a scale of its own. Returns False if a value is not finite."""
    absmax, table = np.empty(1, np.float32), np.empty((4, 1), np.float32)
    fine = True
    for start in range(0, values.size, cols):
        line, target = values[start : start + cols], out[start : start + cols]
        absmax[0] = largest(line)
        fine &= absmax[0] < np.float32(np.inf)
        _factors(absmax, table)
        up, factor, scale, down = table[0, 0], table[1, 0], table[2, 0], table[3, 0]
        for i in range(cols):
            target[i] = _on_grid(line[i], up, factor, scale, down)
    return bool(fine)
