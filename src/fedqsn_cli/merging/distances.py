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
    cols, lanes = values.shape[2], np.empty((4, LANES))
    for row in range(values.shape[1]):
        unit = row * across
        for pair in range(start, stop):
            i, j = pairs[pair, 0], pairs[pair, 1]
            lanes[:] = 0.0
            if along:
                shown, other = seen[i, unit : unit + cols], seen[j, unit : unit + cols]
                _add_some(values[i, row], values[j, row], shown, other, lanes)
            elif seen[i, unit] != 0.0 and seen[j, unit] != 0.0:
                _add_all(values[i, row], values[j, row], lanes)
                lanes[3, 0] = cols
            else:
                continue
            _add_totals(lanes[0], lanes[1], lanes[2], lanes[3], sums[pair])


@view_kernel
def _add_all(x: Any, y: Any, lanes: Any) -> None:
    for at in range(0, x.size, LANES):
        _multiply(x[at : at + LANES], y[at : at + LANES], lanes[0], lanes[1], lanes[2])


@view_kernel
def _multiply(x: Any, y: Any, dots: Any, squares: Any, others: Any) -> None:
    for i in range(x.size):
        a, b = x[i], y[i]
        dots[i] += a * b
        squares[i] += a * a
        others[i] += b * b


@view_kernel
def _add_some(x: Any, y: Any, shown: Any, other: Any, lanes: Any) -> None:
    """The same over the weights that both saw; values that were not seen are 0."""
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
def _add_totals(dots: Any, squares: Any, others: Any, counts: Any, sums: Any) -> None:
    """Add the sum of each, from the first to the last: side by side, since each waits for itself."""
    dot = square = another = count = 0.0
    for i in range(LANES):
        dot += dots[i]
        square += squares[i]
        another += others[i]
        count += counts[i]
    sums[0] += dot
    sums[1] += square
    sums[2] += another
    sums[3] += count
