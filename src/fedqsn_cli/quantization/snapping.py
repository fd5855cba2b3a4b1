"""Values rounded to the grid of a format and stored as values again, in the dtype that they had.

    geometry    blocks of one scale
    flat        `block` values in C order                                   int8: a row
    row         `block` values along a row; every row starts a block        int8: a row
    column      `block` values down a column; every column starts a block   int8: a column

A run of values (the whole chunk, one row, one column) gets what quantizing and dequantizing that run alone gives,
except that zeros are always +0.0. A shorter last block follows bitsandbytes' rule for it (see blocks.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.kernels.floats import PIECE, Floats
from fedqsn_cli.kernels.jit import NonFinite, kernel
from fedqsn_cli.kernels.threads import run_ranges
from fedqsn_cli.quantization.blocks import BATCH, SMALLEST, largest, nearest, normalize
from fedqsn_cli.quantization.codebooks import BLOCK_SIZES, codebook
from fedqsn_cli.quantization.snapping8 import column_scales, snap_rows_int8, snap_table_int8

Array = NDArray[Any]
Float32s = NDArray[np.float32]
Step = Callable[[Float32s, Float32s], bool]  # values, out -> are all finite?


def snap(
    x: Array,
    dtype: str,
    *,
    format: str,
    block: int,
    geometry: str,
    rows: int,
    cols: int,
    out: Array,
) -> None:
    """Round a matrix, or whole rows of one, to the grid of a format.

    Args:
        x: rows * cols values in C order; F32, F16 or BF16 (16-bit floats as uint16). A chunk must hold whole blocks,
            unless it is the end: for geometry column, a multiple of `block` rows.
        dtype: what x and out hold.
        format: nf4, fp4, nf3, nf2 or int8.
        block: values a scale; int8 does not use it.
        geometry: flat, row or column (see above).
        out: as x; may be x.

    Raises:
        NonFinite: a value is NaN or infinite.
    """
    source, target = Floats(x, dtype), Floats(out, dtype)
    if source.size != rows * cols or target.size != rows * cols:
        raise ValueError(f"the arrays do not hold {rows} x {cols} values")
    if geometry not in {"flat", "row", "column"} or (format != "int8" and block not in BLOCK_SIZES):
        raise ValueError(f"no geometry {geometry} with blocks of {block}")
    if not rows * cols:
        return
    step, size = _step(source, format, block, geometry, cols)
    flaws: list[int] = []

    def work(start: int, stop: int) -> None:
        read, written = source.scratch(size), target.scratch(size)
        for first in range(start, stop, size):
            last = min(first + size, stop)
            room = target.room(first, last, written)
            if not step(source.read(first, last, read), room):
                flaws.append(first)
            target.write_plain(first, last, room)

    run_ranges(rows * cols, size, work)
    if flaws:
        raise NonFinite("a value is NaN or infinite")


def _step(source: Floats, format: str, block: int, geometry: str, cols: int) -> tuple[Step, int]:
    """What to do with a piece, and how many values make one."""
    whole_rows = max(1, PIECE // cols) * cols
    if format == "int8":
        if geometry != "column":
            return lambda x, out: snap_rows_int8(x, cols, out), whole_rows
        table = column_scales(source, cols)
        return lambda x, out: snap_table_int8(x, table, out), whole_rows
    book = codebook(format)
    if geometry == "column":
        return lambda x, out: _snap_panel(x, cols, block, book.bounds, book.levels, out), block * cols
    size = max(block, PIECE) if geometry == "flat" else whole_rows
    run = size if geometry == "flat" else cols
    return lambda x, out: _snap_runs(x, run, block, book.bounds, book.levels, out), size


@kernel
def _snap_runs(values: Any, run: int, block: int, bounds: Any, levels: Any, out: Any) -> bool:
    """Runs of `run` values, one after the other."""
    batch = max(block, BATCH)
    ratios = np.empty(batch, np.float32)
    scales = np.empty(batch // block, np.float32)
    fine = largest(values) < np.float32(np.inf)
    for begin in range(0, values.size, run):
        end = min(begin + run, values.size)
        for first in range(begin, end, batch):
            last = min(first + batch, end)
            for start in range(first, last, block):
                part, short = values[start : min(start + block, last)], start + block > last
                absmax = largest(part)
                absmax = max(absmax, SMALLEST) if short and absmax > 0 else absmax
                scales[(start - first) // block] = absmax
                normalize(part, absmax, short, ratios[start - first :])
            nearest(ratios[: last - first], bounds, levels, out[first:last])
            for start in range(first, last, block):
                absmax, target = scales[(start - first) // block], out[start : min(start + block, last)]
                for i in range(target.size):
                    target[i] = target[i] * absmax
    return bool(fine)


@kernel
def _snap_panel(values: Any, cols: int, block: int, bounds: Any, levels: Any, out: Any) -> bool:
    """At most `block` whole rows, each column a block; every step goes along rows."""
    absmax, factors, ratios = np.zeros(cols, np.float32), np.empty(cols, np.float32), np.empty(cols, np.float32)
    short = values.size < block * cols
    fine = largest(values) < np.float32(np.inf)
    for start in range(0, values.size, cols):
        line = values[start : start + cols]
        for i in range(cols):
            absmax[i] = max(absmax[i], abs(line[i]))
    for i in range(cols):
        if short and absmax[i] > 0:
            absmax[i] = max(absmax[i], SMALLEST)
        divisor = max(absmax[i], SMALLEST)
        factors[i] = divisor if short else np.float32(1) / divisor
        if absmax[i] == 0:
            factors[i] = np.float32(np.inf) if short else np.float32(0)
    for start in range(0, values.size, cols):
        line, target = values[start : start + cols], out[start : start + cols]
        for i in range(cols):
            ratios[i] = line[i] / factors[i] if short else line[i] * factors[i]
        nearest(ratios, bounds, levels, target)
        for i in range(cols):
            target[i] = target[i] * absmax[i]
    return bool(fine)
