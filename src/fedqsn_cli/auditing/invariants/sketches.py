"""FQ002, FQ007: look for hidden units under every name.

Every row and every column of every tensor is projected on 16 fixed sign vectors (a sketch; of long vectors the 256
numbers in the middle). Copies of a hidden unit, also negated, scaled, shifted by a constant, transposed or rounded,
have nearly the same sketch; candidates come from hash tables over the sketch, so that nothing is compared pairwise,
and each is then compared number by number.

    where                                     found if
    tensors of the truth itself (copies)       |cosine| > 0.9999 with a hidden unit, when any part of the copy is shown
    tensors of a proxy that are not as an     |cosine| > 0.98 with a hidden unit: copies in fp32, fp16, bf16, int8, nf4,
    export makes them, and tensors and files  fp4; for units of fewer than 16 numbers > 1 - 1e-6
    that a proxy does not consist of

Cosines are taken after subtracting means. Not found: copies of part of a unit, copies mixed with other weights, nf3
and nf2 copies, units of fewer than 8 numbers, units that are constant in the middle, encrypted or re-encoded copies.
Single weights as units, and biases, are looked for as whole rows. A table misses a copy in nf4 with probability 0.4;
there are 12.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.auditing.kernels import cell_mates, cells_of, project_columns, project_rows
from fedqsn_cli.kernels.floats import writable
from fedqsn_cli.kernels.jit import as_bits
from fedqsn_cli.kernels.threads import run_ranges

Floats = NDArray[np.float32]
Ints = NDArray[Any]

Together = TypeVar("Together", bound=tuple[Any, ...])

SIZE = 16  # numbers a sketch
WINDOW = 256  # numbers of a vector that are projected
TABLES = 12
SHORTEST = 8  # numbers in a unit that can be told from chance
_MOST = 1 << 16  # pairs at a time
_HASHED = 1 << 12  # vectors that are worth a thread
_ALIKE = 0.95  # cosine of sketches worth a closer look


@cache
def signs(length: int) -> Floats:
    """The sign matrix for `length` numbers, fp32 [length, SIZE], each -1 or 1: bits of SHAKE-256."""
    stream = hashlib.shake_256(b"fedqsn/v1/audit/sketch").digest(length * SIZE // 8)
    return np.unpackbits(np.frombuffer(stream, np.uint8)).reshape(length, SIZE).astype(np.float32) * 2 - 1


class Sketches(NamedTuple):
    """Sketches of many vectors of one length, normalised to length 1 after their means were taken out.

    Args:
        vectors: fp32 [n, SIZE]. where: [n, 3]: (number of the tensor, 0 a row or 1 a column, index).
    """

    vectors: Floats
    where: Ints

    @classmethod
    def of(cls, projected: Floats, width: int, where: Ints) -> Sketches:
        """Of vectors, given what `of_rows` makes of their windows of `width` numbers; constant ones are left out."""
        total, squares = projected[:, SIZE], projected[:, SIZE + 1]
        centred = projected[:, :SIZE] - total[:, None] / np.float32(width) * signs(width).sum(axis=0)
        energy = squares - total * total / np.float32(width)
        norm = np.sqrt(np.einsum("ij,ij->i", centred, centred))
        sound = (energy > 1e-6 * squares) & (energy > 0) & (norm > 0) & np.isfinite(norm)
        return cls((centred[sound] / norm[sound, None]).astype(np.float32), where[sound])


def joined(parts: Sequence[Together]) -> Together:
    """Sketches, and what is known of each beside them, one after the other."""
    return type(parts[0])(*map(np.concatenate, zip(*parts, strict=True)))


def window(length: int) -> tuple[int, int]:
    """The numbers of a vector that are projected: the middle ones, at most WINDOW."""
    width = min(length, WINDOW)
    return (length - width) // 2, (length - width) // 2 + width


def of_rows(x: NDArray[Any], dtype: str) -> Floats:
    """What sketches of rows are made from: fp32 [n, SIZE + 2] projections on the signs, sums, sums of squares.

    Args:
        x: [n, length] as they are stored in the dtype.
    """
    (low, high), (bits, kind) = window(x.shape[1]), as_bits(np.ascontiguousarray(x), dtype)
    projected = np.empty((len(x), SIZE + 2), np.float32)
    project_rows(writable(bits).reshape(x.shape), kind, low, _planes(high - low), projected)
    return projected


def of_columns(x: NDArray[Any], dtype: str, begin: int, width: int) -> Floats:
    """The same for columns; that of parts of a window adds up to that of the window.

    Args:
        x: [part, n] the numbers from `begin` on of the windows of n columns. width: of a window.
    """
    bits, kind = as_bits(np.ascontiguousarray(x), dtype)
    projected = np.empty((x.shape[1], SIZE + 2), np.float32)
    planes = np.ascontiguousarray(_planes(width)[:, begin : begin + len(x)])
    project_columns(writable(bits).reshape(x.shape), kind, planes, projected)
    return projected


@cache
def _planes(width: int) -> Floats:
    return np.ascontiguousarray(signs(width).T)


@dataclass(frozen=True, slots=True)
class HashTable:
    """Sketches by the cell that each is in.

    Args:
        vectors: fp32 [n, SIZE], of length 1. planes: between cells. order: [n] indices of the vectors, cell by cell.
        ends: of the cells in that order.
    """

    vectors: Floats
    planes: Floats
    order: Ints
    ends: Ints

    @classmethod
    def of(cls, vectors: Floats, planes: Floats) -> HashTable:
        """Put vectors into cells."""
        cells = _hash(vectors, planes)
        ends = np.cumsum(np.bincount(cells, minlength=1 << len(planes)))
        return cls(vectors, planes, np.argsort(cells, kind="stable"), ends)

    def like(self, other: Floats, least: float = _ALIKE) -> Iterator[tuple[Ints, Ints]]:
        """Pairs in the same cell whose sketches are alike: indices into both.

        They come a bounded number at a time, the most alike of them first.

        Args:
            other: fp32 [m, SIZE], of length 1. least: |cosine| of a pair.
        """
        first, room, cells = 0, np.empty((_MOST, 2), np.int64), _hash(other, self.planes)
        end, begin = self.ends[cells], np.concatenate([[0], self.ends[:-1]])[cells]
        while first < len(other):
            known = self.vectors, other, self.order, begin, end
            found, first = cell_mates(*known, first, np.float32(least), room)
            if found:
                left, right = room[:found].T.copy()
                alike = np.abs(np.einsum("ij,ij->i", self.vectors[left], other[right]))
                nearest = np.argsort(-alike, kind="stable")
                yield left[nearest], right[nearest]


def hash_tables(vectors: Floats, others: int, tables: int = TABLES) -> Iterator[HashTable]:
    """Hash tables of vectors, to find among so many others those that are like them: each misses some."""
    if len(vectors) and others:
        bits = int(np.clip(np.ceil(np.log2(max(len(vectors), others))), 6, SIZE))
        for planes in _rotations(tables):
            yield HashTable.of(vectors, planes[:bits])


@cache
def _rotations(tables: int) -> tuple[Floats, ...]:
    """Which planes cut the sketches, [SIZE, SIZE] for each table; they decide nothing secret."""
    chance = np.random.Generator(np.random.Philox(2024))
    made = [np.linalg.qr(chance.standard_normal((SIZE, SIZE)))[0] for _ in range(tables)]
    return tuple(np.ascontiguousarray(planes.T, np.float32) for planes in made)


def _hash(vectors: Floats, planes: Floats) -> NDArray[np.uint16]:
    """The cell of each vector, the same for its negative."""
    cells = np.empty(len(vectors), np.uint16)
    run_ranges(len(vectors), _HASHED, lambda first, stop: cells_of(vectors[first:stop], planes, cells[first:stop]))
    return cells


def cosine(one: NDArray[Any], other: NDArray[Any]) -> float:
    """|cosine| of two vectors after their means were taken out; 0 for a constant one."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return abs(float(a @ b)) / norm if norm > 0 and np.isfinite(norm) else 0.0
