"""Values rounded to the grid of a format and stored as values again, in the dtype that they had.

    geometry    blocks of one scale
    flat        `block` values in C order                                   int8: a row
    row         `block` values along a row; every row starts a block        int8: a row
    column      `block` values down a column; every column starts a block   int8: a column

A run of values (the whole chunk, one row, one column) gets what quantizing and dequantizing that run alone gives,
except that zeros are always +0.0. A shorter last block follows bitsandbytes' rule for it (see blocks.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.quantization.blocks import normalize, rank, scaled_levels, stored_absmax
from fedqsn_cli.quantization.codebooks import BLOCK_SIZES, codebook
from fedqsn_cli.quantization.jit import INFINITY, NonFinite, as_bits, kernel, largest, narrow, plain_zeros, widen
from fedqsn_cli.quantization.snapping8 import snap_int8
from fedqsn_cli.quantization.threads import run_ranges

Array = NDArray[Any]
Float32s = NDArray[np.float32]

TILE = 16  # columns that are turned into rows at once: one cache line of fp32 in each row
GRAIN = 1 << 15  # values that are worth a thread


def snap(
    x: Array, dtype: str, *, format: str, block: int, geometry: str, rows: int, cols: int, out: Array,
    absmax: Float32s | None = None,
) -> None:  # fmt: skip
    """Round a matrix, or whole rows of one, to the grid of a format.

    Args:
        x: rows * cols values in C order; F32, F16 or BF16 (16-bit floats as uint16). A chunk must hold whole blocks,
            unless it is the end: for geometry column, a multiple of `block` rows.
        dtype: what x and out hold.
        format: nf4, fp4, nf3, nf2 or int8.
        block: values a scale; int8 does not use it.
        geometry: flat, row or column (see above).
        out: as x; may be x.
        absmax: [cols] largest magnitudes of whole columns, from `column_absmax`: for int8 in geometry column, where a
            chunk does not show them.

    Raises:
        NonFinite: a value is NaN or infinite.
    """
    snap_with(
        x, dtype, format=format, block=block, geometry=geometry, rows=rows, cols=cols, reference=x, out=out,
        absmax=absmax,
    )  # fmt: skip


def snap_with(
    x: Array, dtype: str, *, format: str, block: int, geometry: str, rows: int, cols: int, reference: Array, out: Array,
    absmax: Float32s | None = None,
) -> None:  # fmt: skip
    """As `snap`, but the scale of each block is that of `reference`; what it cannot reach gets the outermost level.

    Args:
        reference: as x. Where a block of it is all zero, so is the result.
        absmax: [cols] of the reference, where `snap` would need it.
    """
    source, kind = as_bits(x, dtype)
    scale_source, target = as_bits(reference, dtype)[0], as_bits(out, dtype)[0]
    if not source.size == scale_source.size == target.size == rows * cols:
        raise ValueError(f"the arrays do not hold {rows} x {cols} values")
    if format == "int8":
        snap_int8(source, scale_source, target, kind, (rows, cols), geometry, absmax)
        return
    if block not in BLOCK_SIZES or geometry not in {"flat", "row", "column"}:
        raise ValueError(f"no geometry {geometry} with blocks of {block}")
    book = codebook(format)
    same = reference is x
    flaws: list[int] = []

    def runs(start: int, stop: int) -> None:
        x, scale_x, y = source[start:stop], scale_source[start:stop], target[start:stop]
        run = cols if geometry == "row" else stop - start
        if not _snap_runs(x, scale_x, same, kind, run, block, book.bounds, book.levels, y):
            flaws.append(start)

    def columns(start: int, stop: int) -> None:
        x, scale_x, y = (flat.reshape(rows, cols) for flat in (source, scale_source, target))
        if not _snap_columns(x, scale_x, same, kind, start, stop, block, book.bounds, book.levels, y):
            flaws.append(start)

    if geometry == "column":
        run_ranges(cols, TILE, columns)
    else:
        unit = block if geometry == "flat" else cols
        run_ranges(source.size, max(1, -(-GRAIN // max(unit, 1))) * max(unit, 1), runs)
    if flaws:
        raise NonFinite("a value is NaN or infinite")


@kernel
def _snap_runs(
    source: Any, reference: Any, same: bool, kind: int, run: int, block: int, bounds: Any, levels: Any, out: Any
) -> bool:
    """Runs of `run` values, one after the other."""
    bits, ranks = np.empty(block, np.uint32), np.empty(block, np.int32)
    fine = True
    for begin in range(0, source.size, run):
        end = min(begin + run, source.size)
        for start in range(begin, end, block):
            part = slice(start, min(start + block, end))
            short = start + block > end
            args = kind, short, bounds, levels, bits, ranks, out[part]
            fine &= _snap_block(source[part], reference[part], same, *args)
    return bool(fine)


@kernel
def _snap_columns(
    source: Any, reference: Any, same: bool, kind: int, first: int, stop: int, block: int, bounds: Any, levels: Any,
    out: Any,
) -> bool:  # fmt: skip
    """Columns first .. stop: tiles of blocks are turned, so that a block lies in memory as it does in a row."""
    bits, ranks = np.empty(block, np.uint32), np.empty(block, np.int32)
    tile = np.empty((TILE, block), source.dtype)
    scale_tile = np.empty((TILE, block), source.dtype)
    fine = True
    for top in range(0, source.shape[0], block):
        count = min(block, source.shape[0] - top)
        short = count < block
        for left in range(first, stop, TILE):
            width = min(TILE, stop - left)
            part = slice(top, top + count), slice(left, left + width)
            _turn(source[part], tile)
            if not same:
                _turn(reference[part], scale_tile)
            for column in range(width):
                values = tile[column, :count]
                scales = values if same else scale_tile[column, :count]
                fine &= _snap_block(values, scales, same, kind, short, bounds, levels, bits, ranks, values)
            _turn(tile[:width, :count], out[part])
    return bool(fine)


@kernel
def _turn(source: Any, out: Any) -> None:
    """out[j, i] = source[i, j]."""
    for i in range(source.shape[0]):
        for j in range(source.shape[1]):
            out[j, i] = source[i, j]


@kernel
def _snap_block(
    source: Any, reference: Any, same: bool, kind: int, short: bool, bounds: Any, levels: Any, bits: Any, ranks: Any,
    out: Any,
) -> bool:  # fmt: skip
    """One block: largest magnitude of the reference, ranks of the values, and sixteen levels to look them up in."""
    count = source.size
    widen(reference, kind, bits)
    top = largest(bits[:count])
    fine = top < INFINITY
    if not same:
        widen(source, kind, bits)
        fine &= largest(bits[:count]) < INFINITY
    absmax = stored_absmax(top, short) if top != 0 else np.float32(0)
    values = bits[:count].view(np.float32)
    normalize(values, absmax, short)
    rank(values, bounds, ranks)
    wide = np.empty(levels.size, np.uint32)
    table = np.empty(levels.size, out.dtype)
    scaled_levels(levels, absmax, wide)
    narrow(wide, kind, table)
    plain_zeros(table)
    for i in range(count):
        out[i] = table[ranks[i]]
    return bool(fine)
