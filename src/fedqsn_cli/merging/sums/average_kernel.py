"""The average of a few updates and its step, compiled: a piece of every row goes through all of it in the first cache.

    t_k = c_k u_k                             c_k = w_k / s_k
    m   = Σ RN(t_k) / Σ w_k                   RN: to the nearest multiple of 2^-64, as in `exact_sum`
    W'  = W + η m

A term is a multiple of 2^-16 and one of 2^-64, of 2^-17 at most. Here each of the two is added up in double precision,
which is exact for `MOST_AVERAGED` terms of less than 2^32, and their sum is rounded once, as `Digits.settle` does it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedqsn_cli.kernels.jit import view_kernel, widen
from fedqsn_cli.merging.sums.arithmetic import PIECE, fold
from fedqsn_cli.merging.sums.exact_sum import in_two
from fedqsn_cli.merging.sums.stepping import divide, move, spread_divisors

MOST_AVERAGED = 8
LANES = 128  # partial sums of squares and products, in an order that vectorises
STRIPE = 16  # rows whose columns are summed together, whatever the number of threads

DOUBLES = 5, PIECE
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
    coarse, fine, divisor, mean, lanes = doubles[0], doubles[1], doubles[2], doubles[3], doubles[4, :LANES]
    for row in range(start, stop):
        for at in range(0, cols, PIECE):
            size, piece = min(PIECE, cols - at), at // PIECE
            coarse[:size], fine[:size] = 0.0, 0.0
            for k in range(clients):
                if places[k, row] < 0:
                    continue
                taken = values[k, :size]
                if columns[k].size:
                    first, last = firsts[k, piece], firsts[k, piece + 1]
                    begin = places[k, row] * columns[k].size
                    widen(us[k][begin + first : begin + last], kind, packed)
                    _spread(packed[: last - first].view(np.float32), columns[k][first:last], at, taken, shown[k, :size])
                    _add_squares(taken, column_squares[k, row // STRIPE, at : at + size])
                else:
                    begin = places[k, row] * cols + at
                    widen(us[k][begin : begin + size], kind, taken.view(np.uint32))
                sums[_U_U, k, row] += _product(taken, taken, lanes)
                _add_terms(taken, coefficients[k], coarse, fine)
            _add_up(coarse[:size], fine[:size])
            spread_divisors(divisors[at : at + size] if by_column else divisors[row : row + 1], divisor[:size])
            divide(coarse[:size], divisor, 1.0, mean)
            square = _product(mean[:size], mean[:size], lanes)
            for k in range(clients):
                if places[k, row] < 0:
                    continue
                sums[_U_M, k, row] += _product(values[k, :size], mean, lanes)
                sums[_M_M, k, row] += _square_of(mean, shown[k, :size], fine, lanes) if columns[k].size else square
            if rate != 1.0:
                divide(coarse[:size], divisor, rate, mean)
            bad[row] += move(weights[row, at : at + size], residual[row, at : at + size], stored_kind, mean, room)


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
def _add_terms(values: Any, coefficient: float, coarse: Any, fine: Any) -> None:
    for i in range(values.size):
        high, low = in_two(coefficient * np.float64(values[i]))
        coarse[i] += high
        fine[i] += low


@view_kernel
def _add_up(coarse: Any, fine: Any) -> None:
    for i in range(coarse.size):
        coarse[i] += fine[i]


@view_kernel
def _product(a: Any, b: Any, lanes: Any) -> float:
    """Σ a b over the numbers of `a`; `lanes` are zeros before and afterwards."""
    for at in range(0, a.size, LANES):
        _add_products(a[at : at + LANES], b[at : at + LANES], lanes)
    result = float(fold(lanes))
    lanes[:] = 0.0
    return result


@view_kernel
def _add_products(a: Any, b: Any, lanes: Any) -> None:
    for i in range(a.size):
        lanes[i] += np.float64(a[i]) * np.float64(b[i])


@view_kernel
def _square_of(mean: Any, shown: Any, room: Any, lanes: Any) -> float:
    """Σ m² where it is shown."""
    seen = room[: shown.size]
    for i in range(shown.size):
        seen[i] = mean[i] * shown[i]
    return _product(seen, seen, lanes)
