"""The average of a few updates over one chunk, and its step, in one go: sums and steps never leave the first cache.

It makes the same model as `ChunkSum`, which takes one update after the other, and everything that is merged otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.kernels.jit import as_bits
from fedqsn_cli.kernels.threads import run_ranges
from fedqsn_cli.kernels.values import widened
from fedqsn_cli.merging.rules.aggregation import Aggregation
from fedqsn_cli.merging.step.chunk_sum import require_finite, require_summable, unit_count
from fedqsn_cli.merging.step.chunks import ModelChunk
from fedqsn_cli.merging.sums.arithmetic import GRAIN, PIECE, PieceSquares
from fedqsn_cli.merging.sums.average_kernel import (
    DOUBLES,
    MOST_AVERAGED,
    STRIPE,
    average_rows,
    singles_for,
)
from fedqsn_cli.merging.updates.read_update import UpdateChunk, UpdateReader
from fedqsn_cli.planning.tensor_plan import UnitAxis

Doubles = NDArray[np.float64]
Longs = NDArray[np.int64]

_NO_COLUMNS = np.empty(0, np.int64)


def is_average(how: Aggregation, clients: int) -> bool:
    """Whether few updates are put together, as an average over those that saw a unit."""
    plain = how.order is None and how.noise is None and how.divisor is None and how.least == 1
    return plain and 0 < clients <= MOST_AVERAGED


def is_matrix(chunk: ModelChunk) -> bool:
    """Whether the units of a chunk are rows or columns of a matrix, or all of it."""
    return chunk.task.plan.axis != "element" and len(chunk.task.plan.shape) > 1 and chunk.values.shape[1] > 1


@dataclass(frozen=True, slots=True)
class _Part:
    """What one update has of a chunk.

    Args:
        columns: the columns that it has; nothing if it has all. places: for each row of the chunk which row of U it is.
    """

    reader: UpdateReader
    piece: UpdateChunk
    axis: UnitAxis | None
    weight: float
    coefficient: float
    columns: Longs
    places: Longs

    @classmethod
    def of(cls, chunk: ModelChunk, reader: UpdateReader, piece: UpdateChunk, weight: float, factor: float) -> _Part:
        tensor, index = chunk.task.plan, piece.part.index
        axis = reader.update.axis(tensor)
        places = np.arange(chunk.rows)
        if axis == "row":
            places = np.full(chunk.rows, -1)
            places[index] = np.arange(index.size)
        elif axis == "column" and not index.size:
            places = np.full(chunk.rows, -1)
        columns = index if axis == "column" else _NO_COLUMNS
        return cls(reader, piece, axis, weight, weight * factor / reader.update.scale(tensor), columns, places)

    @property
    def seen(self) -> Longs | slice:
        """The units that it has."""
        return slice(None) if self.axis is None else self.piece.part.index

    def squares(self, rows: Doubles, columns: Doubles, cols: int) -> PieceSquares:
        """Σ u² of its units.

        Args:
            rows: of each row of the chunk. columns: of each column in each stripe of rows.
        """
        if self.axis == "column":
            return PieceSquares(float(rows.sum()), columns.sum(axis=0)[self.columns], rows.size, self.columns)
        own = rows if self.axis is None else rows[self.piece.part.index]
        places = np.arange(rows.size) if self.axis is None else self.piece.part.index
        return PieceSquares(float(own.sum()), own, cols, places)


def step_by_average(
    chunk: ModelChunk, readers: Sequence[UpdateReader], pieces: Sequence[UpdateChunk], how: Aggregation, rate: float
) -> int:
    """W' = W + η Δ in place; hashes and measures every update on the way.

    Returns:
        How many weights an update had.

    Raises:
        RefusedUpdate: an update or the result is not finite, or a term is too large for an exact sum.
    """
    given = zip(readers, pieces, how.weights, how.factors, strict=True)
    parts = [_Part.of(chunk, *each) for each in given]
    rows, cols = chunk.values.shape
    tensor = chunk.task.plan
    weights = np.zeros(unit_count(tensor.axis, rows, cols))
    for part in parts:
        part.reader.hash(part.piece.read)
        weights[part.seen] += part.weight
    sums, column_squares, bad = _run(chunk, parts, weights, rate)
    for part, own, columns in zip(parts, sums.transpose(1, 0, 2), column_squares, strict=True):
        squares = part.squares(own[0], columns, cols)
        part.reader.measure(tensor, chunk.first, squares, part.piece.read.values.size)
        require_summable(part.reader, tensor, part.coefficient, squares)
        part.reader.measures.compare(*own.sum(axis=1).tolist(), scale=part.reader.update.scale(tensor))
    require_finite(bad, chunk.task.name)
    return int(np.count_nonzero(weights)) * (chunk.values.size // weights.size)


def _run(chunk: ModelChunk, parts: Sequence[_Part], weights: Doubles, rate: float) -> tuple[Doubles, Doubles, int]:
    """Sums of products [updates, 3, rows], of columns [updates, stripes, cols], and how many weights are not finite."""
    (rows, cols), axis = chunk.values.shape, chunk.task.plan.axis
    us, kind = _bits([part.piece for part in parts])
    stored, stored_kind = as_bits(chunk.values, chunk.task.tensor.dtype)
    residual = np.empty((rows, 0), np.uint16) if chunk.residual is None else chunk.residual
    columns = _filled([part.columns for part in parts])
    edges = np.arange(0, cols + PIECE, PIECE)
    firsts = np.stack([np.searchsorted(part.columns, edges) for part in parts])
    places, coefficients = np.stack([part.places for part in parts]), np.array([part.coefficient for part in parts])
    divisors = weights if axis == "column" or weights.size == rows else np.full(rows, weights[0])
    sums, bad = np.zeros((3, len(parts), rows)), np.zeros(rows, np.int64)
    stripes = -(-rows // STRIPE) if any(part.columns.size for part in parts) else 0
    column_squares = np.zeros((len(parts), stripes, cols))

    def work(start: int, stop: int) -> None:
        doubles, singles = np.zeros(DOUBLES), np.zeros(singles_for(len(parts)), np.float32)
        average_rows(
            *(us, kind, columns, firsts, places, coefficients, divisors, axis == "column", rate),
            *(stored.reshape(rows, cols), residual, stored_kind, start, stop, doubles, singles),
            *(sums, column_squares, bad),
        )

    if not all(part.piece.read.untrained for part in parts):  # else nothing moves
        run_ranges(rows, STRIPE * -(-GRAIN // (STRIPE * cols)), work)
    return sums, column_squares, int(bad.sum())


def _bits(pieces: Sequence[UpdateChunk]) -> tuple[tuple[NDArray[Any], ...], int]:
    """Stored bits of all updates, and their common dtype: fp32 where they have several."""
    read = [piece.read for piece in pieces]
    if len({each.dtype for each in read}) == 1:
        found = [as_bits(each.values, each.dtype) for each in read]
    else:
        found = [as_bits(widened(each.values, each.dtype), "F32") for each in read]
    return _filled([bits for bits, _ in found]), found[0][1]


def _filled(arrays: Sequence[NDArray[Any]]) -> tuple[NDArray[Any], ...]:
    """As many arrays as the kernel takes; those that are not needed are empty."""
    return (*arrays, *[arrays[0][:0]] * (MOST_AVERAGED - len(arrays)))
