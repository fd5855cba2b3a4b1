"""The arithmetic of merging, compiled: one pass over memory each.

Sums of updates are exact (`exact_sum`). Steps are in double precision and rounded once, to fp32 and from there to the
model's dtype (to nearest, ties to even), so a result depends neither on chunk size nor on the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.kernels.jit import as_bits, kernel, view_kernel, widen
from fedqsn_cli.kernels.threads import run_ranges
from fedqsn_cli.kernels.values import narrowed, widened
from fedqsn_cli.merging.sums.exact_sum import FINE, Digits, add_run, add_scattered
from fedqsn_cli.planning.tensor_plan import UnitAxis

Array = NDArray[Any]
Doubles = NDArray[np.float64]

PIECE = 1024  # values that go through each step together: all arrays of a piece fit in L1
RUN = 16384  # values of a part, where the parts are not rows
GRAIN = 1 << 16  # minimum number of values for a thread
_NONE, _NO_DOUBLES = np.empty(0, np.int64), np.empty(0)
STRIPE = 64  # rows whose columns are summed together: the same ones, whatever the number of threads

FLAT, ROWS, COLUMNS, ELEMENTS = 0, 1, 2, 3
MODES = {None: FLAT, "row": ROWS, "column": COLUMNS, "element": ELEMENTS}


@dataclass(frozen=True, slots=True)
class PieceSquares:
    """Sums of squares of a piece of U.

    Args:
        total: of all its numbers; NaN or infinite if one of them is.
        units: of each seen row, or of each seen column in these rows; where units are single numbers, the largest
            square alone. width: how many numbers each of them is the sum of.
        places: what row, column or flat position within the rows each of `units` is of.
    """

    total: float
    units: Doubles
    width: int
    places: NDArray[np.int64]

    @classmethod
    def of_zeros(cls, width: int) -> PieceSquares:
        """Of a piece of zeros, in which no unit is worth naming."""
        return cls(0.0, np.zeros(0), width, _NONE)

    def divided(self, scale: float) -> PieceSquares:
        """The squares of U / scale."""
        return PieceSquares(self.total / scale**2, self.units / scale**2, self.width, self.places)


def add(
    total: Doubles | Digits,
    u: Array,
    dtype: str,
    index: NDArray[np.int64],
    axis: UnitAxis | None,
    coefficient: float,
) -> PieceSquares:
    """total += coefficient * U on the elements that U holds.

    Args:
        total: [rows, cols], in double precision or exact.
        u: stored bits of U for these rows: [seen rows * cols], [rows * seen columns] or [seen elements].
        index: the seen rows, columns or elements; unused when U has no units.
    """
    bits, kind = as_bits(u, dtype)
    plain, high, low = (_NO_DOUBLES, total.high, total.low) if isinstance(total, Digits) else (total, _NONE, _NONE)
    rows, cols = high.shape if isinstance(total, Digits) else plain.shape
    sums = plain.reshape(-1), high.reshape(-1), low.reshape(-1)
    mode, width, parts = parts_of(u.size, axis, rows, cols)
    squares = np.zeros(parts)
    columns = np.zeros((-(-parts // STRIPE), width) if mode == COLUMNS else (0, 0))

    def work(start: int, stop: int) -> None:
        _add(*sums, cols, bits, kind, index, mode, width, start, stop, coefficient, squares, columns)

    grain = max(1, GRAIN // max(width, 1))
    run_ranges(parts, -(-grain // STRIPE) * STRIPE if mode == COLUMNS else grain, work)
    if mode == ROWS:
        return PieceSquares(float(squares.sum()), squares, cols, index)
    if mode == COLUMNS:
        sums = columns.sum(axis=0)
        return PieceSquares(float(sums.sum()), sums, rows, index)
    return _of_numbers(float(squares.sum()), bits, kind, index if axis else None)


def parts_of(size: int, axis: UnitAxis | None, rows: int, cols: int) -> tuple[int, int, int]:
    """How `size` numbers of U are gone through for rows [rows, cols]: the mode, the width of a part, and how many."""
    mode = ELEMENTS if axis == "row" and cols == 1 else MODES[axis]
    width = {FLAT: RUN, ROWS: cols, COLUMNS: size // max(rows, 1), ELEMENTS: RUN}[mode]
    return mode, width, -(-size // max(width, 1))


def _of_numbers(total: float, bits: Array, kind: int, index: NDArray[np.int64] | None) -> PieceSquares:
    """The squares where units are single numbers; `index` are their flat positions, None for all of the rows."""
    if not bits.size:
        return PieceSquares(total, np.zeros(0), 1, np.zeros(0, np.int64))
    tops = np.zeros(-(-bits.size // RUN))
    run_ranges(tops.size, GRAIN // RUN, lambda start, stop: _tops(bits, kind, start, stop, tops))
    first = int(tops.argmax()) * RUN
    values = np.empty(min(RUN, bits.size - first), np.uint32)
    widen(bits[first : first + values.size], kind, values)
    at = first + int(np.abs(values.view(np.float32)).argmax())
    return PieceSquares(total, tops.max(keepdims=True), 1, np.array([at if index is None else index[at]], np.int64))


@kernel
def _tops(x: Any, kind: int, start: int, stop: int, tops: Any) -> None:
    """The largest square of each run of values."""
    bits = np.empty(PIECE, np.uint32)
    values = bits.view(np.float32)
    for part in range(start, stop):
        top = 0.0
        for at in range(part * RUN, min((part + 1) * RUN, x.size), PIECE):
            count = min(PIECE, x.size - at)
            widen(x[at : at + count], kind, bits)
            for i in range(count):
                top = max(top, np.float64(values[i]) * np.float64(values[i]))
        tops[part] = top


@kernel
def _add(
    total: Any,
    high: Any,
    low: Any,
    cols: int,
    u: Any,
    kind: int,
    index: Any,
    mode: int,
    width: int,
    start: int,
    stop: int,
    coefficient: float,
    squares: Any,
    columns: Any,
) -> None:
    """Parts start .. stop of U, `width` values each; the sum of squares of each part, or of each column of a stripe.

    They go into `total`, or where that is empty into `high` and `low`.
    """
    bits, sums = np.empty(PIECE, np.uint32), np.empty(PIECE, np.float64)
    values = bits.view(np.float32)
    for part in range(start, stop):
        sums[:] = 0.0
        first, end = part * width, min((part + 1) * width, u.size)
        for at in range(first, end, PIECE):
            count = min(PIECE, end - at)
            widen(u[at : at + count], kind, bits)
            inside = at - first
            if mode == COLUMNS:
                line, stripe = slice(part * cols, (part + 1) * cols), columns[part // STRIPE, inside : inside + count]
                places = index[inside : inside + count]
                if total.size:
                    _add_scattered(values[:count], total[line], places, coefficient, stripe)
                else:
                    add_scattered(values[:count], high[line], low[line], places, coefficient, stripe)
            elif mode == ELEMENTS:
                places = index[at : at + count]
                if total.size:
                    _add_scattered(values[:count], total, places, coefficient, sums)
                else:
                    add_scattered(values[:count], high, low, places, coefficient, sums)
            else:
                begin = (index[part] * cols if mode == ROWS else first) + inside
                line = slice(begin, begin + count)
                if total.size:
                    _add_run(values[:count], total[line], coefficient, sums)
                else:
                    add_run(values[:count], high[line], low[line], coefficient, sums)
        squares[part] = fold(sums)


@kernel
def _add_run(values: Any, total: Any, coefficient: float, sums: Any) -> None:
    for i in range(values.size):
        x = np.float64(values[i])
        total[i] += coefficient * x
        sums[i] += x * x


@kernel
def _add_scattered(values: Any, total: Any, index: Any, coefficient: float, sums: Any) -> None:
    for i in range(values.size):
        x = np.float64(values[i])
        total[index[i]] += coefficient * x
        sums[i] += x * x


@view_kernel
def fold(sums: Any) -> float:
    """Sum of a power of two of numbers, in an order that vectorises; they are overwritten."""
    size = sums.size // 2
    while size:
        _add_to(sums[:size], sums[size : 2 * size])
        size //= 2
    return float(sums[0])


@view_kernel
def _add_to(sums: Any, others: Any) -> None:
    for i in range(sums.size):
        sums[i] += others[i]


def subtract(total: Doubles, drift: Doubles, factors: Doubles) -> None:
    """total -= factors * drift; `drift` holds that product afterwards.

    It is rounded as the terms of `total` were: a client that sent the same is cancelled to the last bit. Where a factor
    is 0, no client saw the unit, and its sum stays as it is.

    Args:
        total, drift: [rows, cols]. factors: broadcast to that shape.
    """
    np.multiply(drift, factors / FINE, out=drift)
    np.multiply(np.rint(drift, out=drift), FINE, out=drift)
    np.subtract(total, drift, out=total)


def sum_of_squares(x: Array, dtype: str) -> float:
    """Sum of squares of stored floats."""
    bits, kind = as_bits(x, dtype)
    squares = np.zeros(-(-bits.size // RUN))

    def work(start: int, stop: int) -> None:
        _squares(bits, kind, start, stop, squares)

    run_ranges(squares.size, GRAIN // RUN, work)
    return float(squares.sum())


@kernel
def _squares(x: Any, kind: int, start: int, stop: int, squares: Any) -> None:
    bits, sums = np.empty(PIECE, np.uint32), np.empty(PIECE, np.float64)
    values = bits.view(np.float32)
    for part in range(start, stop):
        sums[:] = 0.0
        for at in range(part * RUN, min((part + 1) * RUN, x.size), PIECE):
            count = min(PIECE, x.size - at)
            widen(x[at : at + count], kind, bits)
            for i in range(count):
                sums[i] += np.float64(values[i]) * np.float64(values[i])
        squares[part] = fold(sums)


def mix(a: Array, x: float, b: Array, y: float, dtype: str) -> Array:
    """x * a + y * b of stored floats, in double precision, rounded to fp32 and then to the dtype; fresh array."""
    first, second = (widened(part, dtype).astype(np.float64) for part in (a, b))
    with np.errstate(invalid="ignore", over="ignore"):
        result = (x * first + y * second).astype(np.float32)
    return narrowed(result, dtype).reshape(a.shape)


def add_difference(fill: Array, blend: float, full: Array, base: Array, dtype: str) -> Array:
    """fill + blend * (full - base) of stored floats, in double precision, rounded to fp32 and then to the dtype.

    With blend 1, `full` itself where the fill is still the base, to the sign of a zero.
    """
    now, end, start = (widened(part, dtype).astype(np.float64) for part in (fill, full, base))
    with np.errstate(invalid="ignore", over="ignore"):
        result = (now + blend * (end - start)).astype(np.float32)
    bits = narrowed(result, dtype).reshape(fill.shape)
    if blend < 1:
        return bits
    return np.where(fill.view(bits.dtype) == base.view(bits.dtype), full.view(bits.dtype), bits)
