"""How far apart updates are, over the units that both of two clients saw.

    D_ij = Σ (Δ_i - Δ_j)² / number of weights       over the weights that i and j both saw

It is normalised, because two clients may have many or few units in common. With masks it estimates what the distance
would be if both had seen everything. The sums that it is made of are kept, so that updates may be clipped afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.kernels.jit import kernel, view_kernel
from fedqsn_cli.kernels.threads import run_ranges

Doubles = NDArray[np.float64]

LANES = 64  # partial sums that a row is added to, in an order that vectorises
SUMS = 4  # that are completed side by side


class PairSums:
    """Sums over the weights that two clients both saw: Δ_i Δ_j, Δ_i², Δ_j² and how many those are, for each pair."""

    def __init__(self, clients: int) -> None:
        self._clients = clients
        self._pairs = np.array(list(combinations(range(clients), 2)), np.int64).reshape(-1, 2)
        self._sums = np.zeros((len(self._pairs), 4))

    def add(self, values: Doubles, seen: Doubles, strides: tuple[int, int]) -> None:
        """Some rows of all updates: see `chunk_stack`."""
        across, along = strides

        def work(start: int, stop: int) -> None:
            _add_pairs(values, seen, across, along, self._pairs, start, stop, self._sums)

        run_ranges(len(self._pairs), 1, work)

    def add_zeros(self, seen: Doubles, size: int) -> None:
        """Some rows that no update moves, `size` weights: they only count."""
        first, second = self._pairs.T
        self._sums[:, 3] += (seen @ seen.T)[first, second] * (size // max(1, seen.shape[1]))

    def distances(self, kept: Sequence[int], factors: Sequence[float]) -> Doubles:
        """D of some of the updates, each of them times its factor: [kept, kept].

        Infinite for two clients that saw nothing in common.
        """
        place = np.full(self._clients, -1)
        place[list(kept)] = range(len(kept))
        both = (place[self._pairs] >= 0).all(axis=1)
        first, second = place[self._pairs[both]].T
        dot, square, other, count = self._sums[both].T
        x, y = np.asarray(factors, np.float64)[first], np.asarray(factors, np.float64)[second]
        squares = x**2 * square + y**2 * other - 2 * x * y * dot
        result = np.zeros((len(kept), len(kept)))
        result[first, second] = np.where(count > 0, np.maximum(squares, 0.0) / np.maximum(count, 1.0), np.inf)
        return result + result.T


@kernel
def _add_pairs(values: Any, seen: Any, across: int, along: int, pairs: Any, start: int, stop: int, sums: Any) -> None:
    """Pairs start .. stop, row after row: the result depends neither on threads nor on where chunks end."""
    clients, rows, cols = values.shape
    lanes, totals, squares = np.empty((SUMS, LANES)), np.empty(SUMS), np.empty(clients)
    for row in range(rows):
        unit = row * across
        if along:
            for pair in range(start, stop):
                i, j = pairs[pair, 0], pairs[pair, 1]
                shown, other = seen[i, unit : unit + cols], seen[j, unit : unit + cols]
                lanes[:] = 0.0
                _add_some(values[i, row], values[j, row], shown, other, lanes)
                _complete(lanes, totals)
                for which in range(SUMS):
                    sums[pair, which] += totals[which]
            continue
        for first in range(0, clients, SUMS):
            last = min(first + SUMS, clients)
            lanes[:] = 0.0
            for client in range(first, last):
                _add_products(values[client, row], values[client, row], lanes[client - first])
            _complete(lanes, totals)
            squares[first:last] = totals[: last - first]
        for first in range(start, stop, SUMS):
            last = min(first + SUMS, stop)
            lanes[:] = 0.0
            for pair in range(first, last):
                i, j = pairs[pair, 0], pairs[pair, 1]
                if seen[i, unit] != 0.0 and seen[j, unit] != 0.0:
                    _add_products(values[i, row], values[j, row], lanes[pair - first])
            _complete(lanes, totals)
            for pair in range(first, last):
                i, j = pairs[pair, 0], pairs[pair, 1]
                if seen[i, unit] != 0.0 and seen[j, unit] != 0.0:
                    sums[pair, 0] += totals[pair - first]
                    sums[pair, 1] += squares[i]
                    sums[pair, 2] += squares[j]
                    sums[pair, 3] += cols


@view_kernel
def _add_products(x: Any, y: Any, dots: Any) -> None:
    for at in range(0, x.size, LANES):
        _multiply(x[at : at + LANES], y[at : at + LANES], dots)


@view_kernel
def _multiply(x: Any, y: Any, dots: Any) -> None:
    for i in range(x.size):
        dots[i] += x[i] * y[i]


@view_kernel
def _add_some(x: Any, y: Any, shown: Any, other: Any, lanes: Any) -> None:
    """Products, squares of both and numbers of the weights that both saw; values that were not seen are 0."""
    for at in range(0, x.size, LANES):
        end = at + LANES
        _multiply_seen(x[at:end], y[at:end], shown[at:end], other[at:end], lanes[0], lanes[1], lanes[2], lanes[3])


@view_kernel
def _multiply_seen(x: Any, y: Any, shown: Any, other: Any, dots: Any, squares: Any, others: Any, counts: Any) -> None:
    for i in range(x.size):
        a, b = x[i], y[i]
        dots[i] += a * b
        squares[i] += a * a * other[i]
        others[i] += b * b * shown[i]
        counts[i] += shown[i] * other[i]


@view_kernel
def _complete(lanes: Any, totals: Any) -> None:
    """The sum of each, from the first to the last: side by side, since each waits for itself."""
    a = b = c = d = 0.0
    for i in range(LANES):
        a += lanes[0, i]
        b += lanes[1, i]
        c += lanes[2, i]
        d += lanes[3, i]
    totals[0], totals[1], totals[2], totals[3] = a, b, c, d
