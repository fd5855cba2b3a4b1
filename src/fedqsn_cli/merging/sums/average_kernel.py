"""The average of a few updates and its step, compiled: a piece of every row goes through all of it in the first cache.

    t_k = c_k u_k                             c_k = w_k / s_k
    m   = Σ RN(t_k) / Σ w_k                   RN: to the nearest multiple of 2^-64, as in `exact_sum`
    W'  = W + η m

A term is a multiple of 2^-16 and one of 2^-64. Each of the two is added up as an integer, `MOST_AVERAGED` terms of less
than 2^32 at most; so both sums are exact in double precision, too, and their sum is rounded once, as `Digits.settle`
does it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedqsn_cli.kernels.jit import F32, view_kernel, widen
from fedqsn_cli.merging.sums.arithmetic import PIECE, fold
from fedqsn_cli.merging.sums.exact_sum import COARSE, COARSE_BITS, FINE, FINE_BITS, TO_COARSE, TO_FINE
from fedqsn_cli.merging.sums.stepping import divide, move, spread_divisors

MOST_AVERAGED = 8
LANES = 128  # partial sums of squares and products, in an order that vectorises
PARTS = 4
RUN = PARTS * LANES  # numbers of which four at a time go into a partial sum: it is loaded and stored once for them
STRIPE = 16  # rows whose columns are summed together, whatever the number of threads

DOUBLES = 6, PIECE
"""Shape of the room that a call needs in double precision, zeros at first."""

_U_U, _U_M, _M_M = 0, 1, 2  # which sums


def singles_for(updates: int) -> tuple[int, int]:
    """Shape of the room that a call needs in single precision."""
    return 2 * updates + 4, PIECE


@view_kernel
def average_rows(
    us: Any,
    kind: int,
    columns: Any,
    firsts: Any,
    places: Any,
    coefficients: Any,
    divisors: Any,
    by_column: bool,
    rate: float,
    weights: Any,
    residual: Any,
    stored_kind: int,
    start: int,
    stop: int,
    doubles: Any,
    singles: Any,
    sums: Any,
    column_squares: Any,
    bad: Any,
) -> None:
    """Move rows start .. stop of a matrix by the average, in place.

    Args:
        us: stored bits of each update, [its rows * its columns]. kind: their dtype.
        columns: the columns that each update has; empty if it has all.
        firsts: [updates, pieces + 1], how many of them come before each piece of a row.
        places: [updates, rows], which row of an update a row of the matrix is; -1 if the update does not have it.
        divisors: Σ w_k for each row or, where `by_column`, for each column.
        doubles, singles: room, see `DOUBLES` and `singles_for`.
        weights: stored bits of the matrix. residual: bf16 bits of it, or [rows, 0]. stored_kind: dtype of the matrix.
        sums: [3, updates, rows], Σ u², Σ u m and Σ m² over what an update has.
        column_squares: [updates, stripes, cols], Σ u² of updates that do not have all columns.
        bad: [rows], how many weights became infinite or NaN.
    """
    clients, cols = places.shape[0], weights.shape[1]
    values, shown = singles[:clients], singles[clients : 2 * clients]
    room = singles[2 * clients :].view(np.uint32)
    packed = room[0]  # not needed any more when weights move
    coarse, fine = doubles[0].view(np.uint64), doubles[1].view(np.uint64)
    total, divisor, mean, spare, lanes = doubles[2], doubles[3], doubles[4], doubles[1], doubles[5, :LANES]
    for row in range(start, stop):
        for at in range(0, cols, PIECE):
            size, piece = min(PIECE, cols - at), at // PIECE
            _begin(coarse[:size], fine[:size], _present(places, row))
            for k in range(clients):
                if places[k, row] < 0:
                    continue
                begin, taken = places[k, row] * cols + at, values[k, :size]
                if columns[k].size:
                    first, last = firsts[k, piece], firsts[k, piece + 1]
                    begin = places[k, row] * columns[k].size
                    widen(us[k][begin + first : begin + last], kind, packed)
                    _spread(packed[: last - first].view(np.float32), columns[k][first:last], at, taken, shown[k, :size])
                    _add_squares(taken, column_squares[k, row // STRIPE, at : at + size])
                elif kind == F32:
                    taken = us[k][begin : begin + size].view(np.float32)
                else:
                    widen(us[k][begin : begin + size], kind, taken.view(np.uint32))
                sums[_U_U, k, row] += _add_terms(taken, coefficients[k], coarse, fine, lanes)
            _add_up(coarse[:size], fine[:size], total)
            spread_divisors(divisors[at : at + size] if by_column else divisors[row : row + 1], divisor[:size])
            divide(total[:size], divisor, 1.0, mean)
            square = _product(mean[:size], mean[:size], lanes)
            for k in range(clients):
                if places[k, row] < 0:
                    continue
                begin, taken = places[k, row] * cols + at, values[k, :size]
                if kind == F32 and not columns[k].size:
                    taken = us[k][begin : begin + size].view(np.float32)
                sums[_U_M, k, row] += _product(taken, mean[:size], lanes)
                sums[_M_M, k, row] += _square_of(mean, shown[k, :size], spare, lanes) if columns[k].size else square
            if rate != 1.0:
                divide(total[:size], divisor, rate, mean)
            bad[row] += move(weights[row, at : at + size], residual[row, at : at + size], stored_kind, mean, room)


@view_kernel
def _present(places: Any, row: int) -> int:
    """How many updates have a row."""
    count = 0
    for k in range(places.shape[0]):
        count += int(places[k, row] >= 0)
    return count


@view_kernel
def _spread(packed: Any, columns: Any, at: int, out: Any, shown: Any) -> None:
    """Put the values of some columns where they belong in a piece that begins at column `at`; zeros elsewhere."""
    out[:], shown[:] = np.float32(0), np.float32(0)
    for i in range(packed.size):
        out[columns[i] - at], shown[columns[i] - at] = packed[i], np.float32(1)


@view_kernel
def _add_squares(values: Any, out: Any) -> None:
    for i in range(values.size):
        x = np.float64(values[i])
        out[i] += x * x


@view_kernel
def _begin(coarse: Any, fine: Any, terms: int) -> None:
    """Sums of so many terms start at what their bits will have too much."""
    count = np.uint64(terms)
    for i in range(coarse.size):
        coarse[i] = np.uint64(0) - count * np.uint64(COARSE_BITS)
        fine[i] = np.uint64(0) - count * np.uint64(FINE_BITS)


@view_kernel
def _add_terms(values: Any, coefficient: float, coarse: Any, fine: Any, lanes: Any) -> float:
    """Add coefficient * values; returns the sum of the values' squares."""
    whole = values.size - values.size % RUN
    for at in range(0, whole, RUN):
        end = at + RUN
        _add_run(values[at:end], coefficient, coarse[at:end], fine[at:end], lanes)
    for at in range(whole, values.size, LANES):
        _add_some(values[at : at + LANES], coefficient, coarse[at:], fine[at:], lanes)
    return _folded(lanes)


@view_kernel
def _add_run(values: Any, coefficient: float, coarse: Any, fine: Any, lanes: Any) -> None:
    for i in range(LANES):
        square = lanes[i]
        for part in range(PARTS):  # unrolled: the loop over i vectorises
            at = part * LANES + i
            square += _add_term(values[at], coefficient, coarse, fine, at)
        lanes[i] = square


@view_kernel
def _add_some(values: Any, coefficient: float, coarse: Any, fine: Any, lanes: Any) -> None:
    for i in range(values.size):
        lanes[i] += _add_term(values[i], coefficient, coarse, fine, i)


@view_kernel
def _add_term(value: float, coefficient: float, coarse: Any, fine: Any, i: int) -> float:
    """Add a term as the bits of two numbers, see `exact_sum`; returns the square of the value."""
    x = np.float64(value)
    term = coefficient * x
    high = term + TO_COARSE
    low = (term - (high - TO_COARSE)) + TO_FINE
    coarse[i] += np.float64(high).view(np.uint64)
    fine[i] += np.float64(low).view(np.uint64)
    return x * x


@view_kernel
def _add_up(coarse: Any, fine: Any, total: Any) -> None:
    for i in range(coarse.size):
        total[i] = np.float64(np.int64(coarse[i])) * COARSE + np.float64(np.int64(fine[i])) * FINE


@view_kernel
def _product(a: Any, b: Any, lanes: Any) -> float:
    """Σ a b over the numbers of `a`; `lanes` are zeros before and afterwards."""
    whole = a.size - a.size % RUN
    for at in range(0, whole, RUN):
        _add_products(a[at : at + RUN], b[at : at + RUN], lanes)
    for at in range(whole, a.size, LANES):
        _add_some_products(a[at : at + LANES], b[at : at + LANES], lanes)
    return _folded(lanes)


@view_kernel
def _add_products(a: Any, b: Any, lanes: Any) -> None:
    for i in range(LANES):
        total = lanes[i]
        for part in range(PARTS):
            at = part * LANES + i
            total += np.float64(a[at]) * np.float64(b[at])
        lanes[i] = total


@view_kernel
def _add_some_products(a: Any, b: Any, lanes: Any) -> None:
    for i in range(a.size):
        lanes[i] += np.float64(a[i]) * np.float64(b[i])


@view_kernel
def _folded(lanes: Any) -> float:
    """The sum of all lanes, which are zeros afterwards."""
    result = float(fold(lanes))
    lanes[:] = 0.0
    return result


@view_kernel
def _square_of(mean: Any, shown: Any, room: Any, lanes: Any) -> float:
    """Σ m² where it is shown."""
    seen = room[: shown.size]
    for i in range(shown.size):
        seen[i] = mean[i] * shown[i]
    return _product(seen, seen, lanes)
