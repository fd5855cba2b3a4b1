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

from fedqsn_cli.quantization.blocks import SMALLEST, normalize, rank, scaled_levels, stored_absmax
from fedqsn_cli.quantization.codebooks import BLOCK_SIZES, LEVELS, codebook
from fedqsn_cli.quantization.jit import (
    INFINITY,
    MAGNITUDE,
    NonFinite,
    as_bits,
    kernel,
    largest,
    narrow,
    plain_zeros,
    to_bits,
    widen,
)
from fedqsn_cli.quantization.snapping8 import snap_int8
from fedqsn_cli.quantization.threads import run_ranges

Array = NDArray[Any]
Float32s = NDArray[np.float32]

TILE = 32  # columns that are snapped together: a block of 64 rows of them stays in the first cache
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
        args = same, kind, cols, start, stop, block, book.bounds, book.levels, target
        if not _snap_columns(source, scale_source, *args):
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
    wide, table = np.empty(LEVELS, np.uint32), np.empty(LEVELS, out.dtype)
    values, places = bits.view(np.float32), ranks.view(np.uint32)
    fine = True
    for begin in range(0, source.size, run):
        end = min(begin + run, source.size)
        for start in range(begin, end, block):
            stop = min(start + block, end)
            count = stop - start
            widen(reference[start:stop], kind, bits)
            top = largest(bits[:count])
            fine &= top < INFINITY
            if not same:
                widen(source[start:stop], kind, bits)
                fine &= largest(bits[:count]) < INFINITY
            absmax = stored_absmax(top, count < block) if top != 0 else np.float32(0)
            normalize(values[:count], absmax, count < block)
            rank(values[:count], bounds, ranks)
            scaled_levels(levels, absmax, wide)
            narrow(wide, kind, table)
            plain_zeros(table)
            target = out[start:stop]
            for i in range(count):
                target[i] = table[places[i]]
    return bool(fine)


@kernel
def _snap_columns(
    source: Any, reference: Any, same: bool, kind: int, cols: int, first: int, stop: int, block: int, bounds: Any,
    levels: Any, out: Any,
) -> bool:  # fmt: skip
    """Columns first .. stop of flat matrices, in tiles of `block` rows and TILE columns; every step goes along rows."""
    rows = source.size // cols
    bits, ranks = np.empty(block * TILE, np.uint32), np.empty(block * TILE, np.int32)
    values, places = bits.view(np.float32), ranks.view(np.uint32)
    tops, table = np.empty(TILE, np.uint32), np.empty(LEVELS * TILE, out.dtype)
    fine = True
    for top in range(0, rows, block):
        count = min(block, rows - top)
        for left in range(first, stop, TILE):
            start, width = top * cols + left, min(TILE, stop - left)
            fine &= _widen_tile(reference, kind, start, cols, count, width, bits, tops)
            absmax = _column_scales(tops, count < block)
            if not same:
                fine &= _widen_tile(source, kind, start, cols, count, width, bits, tops)
            tile = values[: count * TILE]
            _normalize_tile(tile, absmax, count < block)
            rank(tile, bounds, ranks)
            _levels_of_columns(levels, absmax, kind, table)
            _look_up(places, table, count, out, start, cols, width)
    return bool(fine)


@kernel
def _widen_tile(
    source: Any, kind: int, start: int, cols: int, rows: int, width: int, bits: Any, tops: Any
) -> bool:
    """Rows of a tile, each TILE wide with zeros behind; the bits of the largest magnitude of each column."""
    tops[:] = np.uint32(0)
    for row in range(rows):
        line = bits[row * TILE : (row + 1) * TILE]
        for i in range(width, TILE):
            line[i] = 0
        widen(source[start + row * cols : start + row * cols + width], kind, line)
        for i in range(TILE):
            magnitude = np.uint32(line[i] & MAGNITUDE)
            tops[i] = magnitude if magnitude > tops[i] else tops[i]
    return bool(largest(tops) < INFINITY)


@kernel
def _column_scales(tops: Any, short: bool) -> Any:
    absmax = np.empty(TILE, np.float32)
    for i in range(TILE):
        absmax[i] = stored_absmax(tops[i], short) if tops[i] != 0 else np.float32(0)
    return absmax


@kernel
def _normalize_tile(values: Any, absmax: Any, short: bool) -> None:
    """`normalize`, column by column."""
    factors = np.empty(TILE, np.float32)
    for i in range(TILE):
        divisor = max(absmax[i], SMALLEST)
        factors[i] = divisor if short else np.float32(1) / divisor
        if absmax[i] == np.float32(0):
            factors[i] = np.float32(np.inf) if short else np.float32(0)
    for start in range(0, values.size, TILE):
        line = values[start : start + TILE]
        for i in range(TILE):
            line[i] = line[i] / factors[i] if short else line[i] * factors[i]


@kernel
def _levels_of_columns(levels: Any, absmax: Any, kind: int, table: Any) -> None:
    """table[r * TILE + c] = level r of column c, as it is stored."""
    wide = np.empty(TILE, np.uint32)
    for place in range(LEVELS):
        for i in range(TILE):
            wide[i] = to_bits(levels[place] * absmax[i])
        narrow(wide, kind, table[place * TILE : (place + 1) * TILE])
    plain_zeros(table)


@kernel
def _look_up(places: Any, table: Any, rows: int, out: Any, start: int, cols: int, width: int) -> None:
    """Write the levels of a tile, whose rows of TILE values became rows of `width`."""
    for row in range(rows):
        line = places[row * TILE : (row + 1) * TILE]
        target = out[start + row * cols : start + row * cols + width]
        for i in range(target.size):
            target[i] = table[line[i] * np.uint32(TILE) + np.uint32(i)]
