"""FQ002, FQ007: look for hidden units under every name.

Every row and every column of every tensor is projected on 16 fixed sign vectors (a sketch). Copies of a hidden unit,
also negated, scaled, shifted by a constant, transposed or rounded, have nearly the same sketch; candidates come from
hash tables over the sketch, so that nothing is compared pairwise, and each is then compared number by number.

    where                                     found if
    tensors of the truth itself (twins)       |cosine| > 0.9999 with a hidden unit, when any part of the twin is shown
    tensors of a proxy that are not as an     |cosine| > 0.98 with a hidden unit: copies in fp32, fp16, bf16, int8, nf4,
    export makes them, and tensors and files  fp4; for units of fewer than 16 numbers > 1 - 1e-6
    that a proxy does not consist of

Cosines are taken after subtracting means. Not found: copies of part of a unit, copies mixed with other weights, nf3 and
nf2 copies, units of fewer than 8 numbers, constant units, encrypted or re-encoded copies. Single weights as units, and
biases, are looked for as whole rows. A table misses a copy in nf4 with probability 0.4; there are 12.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

SIZE = 16  # numbers a sketch
TABLES = 12
SHORTEST = 8  # numbers in a unit that can be told from chance
_ALIKE = 0.95  # cosine of sketches worth a closer look


def signs(length: int, start: int = 0, stop: int | None = None) -> Floats:
    """Rows start .. stop of the sign matrix for vectors of `length` numbers: fp32 [rows, SIZE], each -1 or 1.

    A row depends on its index alone (a 64-bit mixer), so chunks of columns can be projected one by one.
    """
    index = np.arange(start, length if stop is None else stop, dtype=np.uint64)
    with np.errstate(over="ignore"):
        x = (index + np.uint64(length) * np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
        x ^= x >> np.uint64(31)
        x *= np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(29)
        x *= np.uint64(0xD6E8FEB86659FD93)
        x ^= x >> np.uint64(32)
    bits = (x[:, None] >> np.arange(SIZE, dtype=np.uint64)) & np.uint64(1)
    return np.asarray(bits.astype(np.float32) * 2 - 1)


@dataclass
class Sketches:
    """Sketches of many vectors of one length, normalised to length 1 after their means were taken out.

    Args:
        vectors: fp32 [n, SIZE]. where: [n, 3]: (number of the tensor, 0 a row or 1 a column, index).
    """

    vectors: list[Floats] = field(default_factory=list)
    where: list[Ints] = field(default_factory=list)

    def add(self, sketch: Floats, total: Floats, squares: Floats, length: int, column_sum: Floats, where: Ints) -> None:
        """Add vectors, given their projections [n, SIZE], sums [n] and sums of squares [n]."""
        centred = sketch - total[:, None] / np.float32(length) * column_sum
        energy = squares - total * total / np.float32(length)
        norm = np.sqrt(np.einsum("ij,ij->i", centred, centred))
        sound = (energy > 1e-6 * squares) & (energy > 0) & (norm > 0) & np.isfinite(norm)
        self.vectors.append((centred[sound] / norm[sound, None]).astype(np.float32))
        self.where.append(where[sound])

    def joined(self) -> tuple[Floats, Ints]:
        """All vectors and where they come from."""
        if not self.vectors:
            return np.empty((0, SIZE), np.float32), np.empty((0, 3), np.int64)
        return np.concatenate(self.vectors), np.concatenate(self.where)


class Sketcher:
    """Takes a matrix in runs of rows, and sketches its rows and columns, by length.

    Args:
        tensor: its number. part: which of the tensor's slices of [rows, cols] it is.
    """

    def __init__(self, book: dict[int, Sketches], tensor: int, rows: int, cols: int, part: int = 0) -> None:
        self._book, self._tensor, self._rows, self._cols, self._part = book, tensor, rows, cols, part
        self._row_signs = signs(cols) if cols >= SHORTEST else None
        self._sums = np.zeros((SIZE + 2, cols), np.float32) if rows >= SHORTEST and cols > 1 else None

    def take(self, first: int, x: Floats) -> None:
        """Rows first .. of the matrix: fp32 [n, cols]."""
        squares = np.square(x)
        if self._row_signs is not None:
            index = self._part * self._rows + first + np.arange(len(x))
            where = np.stack([np.full(len(x), self._tensor), np.zeros(len(x), np.int64), index], 1)
            total, energy = x @ np.ones(self._cols, np.float32), squares @ np.ones(self._cols, np.float32)
            sketches = self._book.setdefault(self._cols, Sketches())
            sketches.add(x @ self._row_signs, total, energy, self._cols, self._row_signs.sum(axis=0), where)
        if self._sums is not None:
            weights = np.concatenate([signs(self._rows, first, first + len(x)), np.ones((len(x), 1), np.float32)], 1)
            self._sums[: SIZE + 1] += weights.T @ x
            self._sums[SIZE + 1] += np.ones(len(x), np.float32) @ squares

    def finish(self) -> None:
        """All rows went by: now the columns are known too."""
        if self._sums is None:
            return
        index = self._part * self._cols + np.arange(self._cols)
        where = np.stack([np.full(self._cols, self._tensor), np.ones(self._cols, np.int64), index], axis=1)
        column_sum = signs(self._rows).sum(axis=0)
        sketches = self._book.setdefault(self._rows, Sketches())
        projections = np.ascontiguousarray(self._sums[:SIZE].T)
        sketches.add(projections, self._sums[SIZE], self._sums[SIZE + 1], self._rows, column_sum, where)


def similar(one: Floats, other: Floats, least: float = _ALIKE) -> Iterator[tuple[Ints, Ints]]:
    """Pairs of sketches that are alike up to sign: indices into both, table by table (pairs may come again).

    Args:
        one, other: fp32 [n, SIZE], of length 1. least: |cosine| of a pair.
    """
    if not len(one) or not len(other):
        return
    bits = int(np.clip(np.ceil(np.log2(max(len(one), len(other)))), 6, SIZE))
    rotations = np.random.Generator(np.random.Philox(2024))  # which planes cut the sketch; decides nothing secret
    for _ in range(TABLES):
        plane, _ = np.linalg.qr(rotations.standard_normal((SIZE, SIZE)))
        left, right = (_hash(vectors, plane.astype(np.float32)[:, :bits]) for vectors in (one, other))
        order = np.argsort(left, kind="stable")
        begin, end = (np.searchsorted(left[order], right, side=side) for side in ("left", "right"))
        yield from _pairs(one, other, order, begin, end, least)


def _hash(vectors: Floats, plane: Floats) -> Ints:
    """On which side of each plane a vector lies; the same for a vector and its negative."""
    sides = (vectors @ plane) > 0
    sides = sides[:, 1:] ^ sides[:, :1]
    return np.asarray(sides @ (1 << np.arange(sides.shape[1], dtype=np.int64)))


def _pairs(
    one: Floats, other: Floats, order: Ints, begin: Ints, end: Ints, least: float
) -> Iterator[tuple[Ints, Ints]]:
    """Pairs in the same cell whose sketches are alike, a bounded number at a time."""
    counts = end - begin
    start = 0
    while start < len(counts):
        upto = np.searchsorted(np.cumsum(counts[start:]), 1 << 21, side="right")
        stop = start + max(1, int(upto))
        size = counts[start:stop]
        right = np.repeat(np.arange(start, stop), size)
        offset = np.arange(len(right)) - np.repeat(np.cumsum(size) - size, size)
        left = order[np.repeat(begin[start:stop], size) + offset]
        cosine = np.abs(np.einsum("ij,ij->i", one[left], other[right]))
        chosen = cosine > least
        if chosen.any():
            yield left[chosen], right[chosen]
        start = stop


def cosine(one: NDArray[Any], other: NDArray[Any]) -> float:
    """|cosine| of two vectors after their means were taken out; 0 for a constant one."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return abs(float(a @ b)) / norm if norm > 0 and np.isfinite(norm) else 0.0
