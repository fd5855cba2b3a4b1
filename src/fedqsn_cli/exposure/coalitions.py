"""Which coalition of m clients has seen most: the maximum coverage problem, which is hard in general.

Where there are few coalitions, all are tried. Else the greedy one (its share is at least 63 % of the best) and random
ones are, and `at_most` bounds what any other can reach: no client adds more to a larger union than to a smaller one, so
no coalition beats the greedy one's part by more than the m largest gains over that part. Where the bound is met, the
answer is exact.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.exposure.results import Coalition
from fedqsn_cli.kernels.jit import kernel
from fedqsn_cli.kernels.threads import run_ranges

Words = NDArray[np.uint64]  # [clients, words]
Floats = NDArray[np.float64]

MOST_WORDS = 400_000_000  # words to look at when all coalitions of a size are tried: half a second
MOST_TRIED = 1_000_000  # coalitions
SAMPLED = 1_000
CLOSE = 1e-9  # shares nearer than this are equal


def worst_coalitions(
    names: Sequence[str],
    bits: Words,
    weights: Floats,
    clear: float,
    sizes: Sequence[int],
    most_tried: int = MOST_TRIED,
) -> tuple[Coalition, ...]:
    """The coalition that has seen most, for each size.

    Args:
        bits: what each client has seen, a bit a unit.
        weights: share of all parameters that a bit of each word stands for.
        clear: share of all parameters that everyone sees.
        sizes: from 2 to the number of clients, rising.
        most_tried: all coalitions of a size are tried if there are not more.
    """
    if not sizes:
        return ()
    search = _Search(bits, weights, most_tried)
    return tuple(_named(names, clear, size, *search.best(size)) for size in sizes)


def _named(
    names: Sequence[str],
    clear: float,
    size: int,
    members: Sequence[int],
    share: float,
    bound: float,
    method: Literal["exact", "greedy", "sampled"],
    tried: int,
) -> Coalition:
    return Coalition(size, tuple(names[i] for i in sorted(members)), clear + share, method, tried, clear + bound)


class _Search:
    """The greedy order of all clients, as far as it is needed, and what is known from it."""

    def __init__(self, bits: Words, weights: Floats, most_tried: int) -> None:
        self.bits, self.weights, self.most_tried = bits, weights, most_tried
        self.order: list[int] = []
        self.shares = [0.0]  # of the first 0, 1, ... clients of the order
        self._covered = np.zeros(bits.shape[1], np.uint64)
        self._gains = [self._gain()]  # of every client over that, for each of those
        self._most = float(self._sum(np.bitwise_or.reduce(bits, axis=0)))

    def best(self, size: int) -> tuple[list[int], float, float, Literal["exact", "greedy", "sampled"], int]:
        """Members, share, upper bound, method and number of coalitions looked at."""
        clients, words = self.bits.shape
        if size == clients:
            return list(range(clients)), self._most, self._most, "exact", 1
        while len(self.order) < size:
            self._grow()
        members, share = self.order[:size], self.shares[size]
        bound = self._bound(size)
        if bound - share < CLOSE:
            return members, share, share, "exact", 1
        count = math.comb(clients, size)
        if count <= self.most_tried and count * size * words <= MOST_WORDS:
            rows = np.fromiter(itertools.chain.from_iterable(itertools.combinations(range(clients), size)), np.int64)
            found, value = self._try(rows.reshape(count, size))
            return found, value, value, "exact", count
        tried = int(min(SAMPLED, max(1, MOST_WORDS // (size * words))))
        rng = np.random.default_rng(size)  # decides nothing but which coalitions are looked at
        found, value = self._try(np.stack([rng.choice(clients, size, replace=False) for _ in range(tried)]))
        if value > share + CLOSE:
            return found, value, bound, "sampled", tried + 1
        return members, share, bound, "greedy", tried + 1

    def _grow(self) -> None:
        gains = self._gains[-1].copy()
        gains[self.order] = -1.0
        chosen = int(np.argmax(gains))
        self.order.append(chosen)
        self.shares.append(self.shares[-1] + float(gains[chosen]))
        self._covered |= self.bits[chosen]
        self._gains.append(self._gain())

    def _bound(self, size: int) -> float:
        bounds = (
            share + float(np.sort(gains)[-size:].sum()) for share, gains in zip(self.shares, self._gains, strict=True)
        )
        return min(self._most, *bounds)

    def _gain(self) -> Floats:
        gains = np.empty(len(self.bits))
        run_ranges(len(gains), 1, lambda a, b: _gains(self.bits, self._covered, self.weights, a, b, gains))
        return gains

    def _sum(self, words: Words) -> float:
        total = np.empty(1)
        _gains(words[None], np.zeros_like(words), self.weights, 0, 1, total)
        return float(total[0])

    def _try(self, rows: NDArray[np.int64]) -> tuple[list[int], float]:
        shares = np.empty(len(rows))
        run_ranges(len(rows), 1, lambda a, b: _unions(self.bits, self.weights, rows, a, b, shares))
        best = int(np.argmax(shares))
        return [int(i) for i in rows[best]], float(shares[best])


@kernel
def _ones(word: Any) -> Any:
    """Bits that are set in a word of 64, as a float."""
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.float64(np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56)))


@kernel
def _gains(bits: Any, covered: Any, weights: Any, first: int, last: int, out: Any) -> None:
    """out[c] = what client c has seen beyond what is covered."""
    for c in range(first, last):
        total = 0.0
        for w in range(weights.size):
            total += weights[w] * _ones(bits[c, w] & ~covered[w])
        out[c] = total


@kernel
def _unions(bits: Any, weights: Any, rows: Any, first: int, last: int, out: Any) -> None:
    """out[r] = what the clients rows[r] have seen together."""
    for r in range(first, last):
        total = 0.0
        for w in range(weights.size):
            word = bits[rows[r, 0], w]
            for i in range(1, rows.shape[1]):
                word |= bits[rows[r, i], w]
            total += weights[w] * _ones(word)
        out[r] = total
