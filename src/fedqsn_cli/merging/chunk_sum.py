"""One chunk of a weighted average: the sum of all updates in double precision, added once.

Every update's rows go into the sum and are gone; only of a few updates, or of a few rows of many, are they kept until
the sum is complete, to measure how each of them points.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.errors import RefusedUpdate
from fedqsn_cli.merging import arithmetic
from fedqsn_cli.merging.chunks import ModelChunk, UpdateChunk
from fedqsn_cli.merging.cosines import KEPT, compare, first_rows
from fedqsn_cli.merging.read_update import UpdateReader
from fedqsn_cli.planning.tensor_plan import TensorPlan, UnitAxis

Doubles = NDArray[np.float64]


class Scratch:
    """Double-precision arrays that chunks use one after the other."""

    def __init__(self) -> None:
        self._arrays: dict[str, Doubles] = {}

    def zeros(self, use: str, shape: tuple[int, ...]) -> Doubles:
        """An array of zeros; what an earlier call for the same use returned is overwritten."""
        array = self.empty(use, shape)
        array[:] = 0
        return array

    def empty(self, use: str, shape: tuple[int, ...]) -> Doubles:
        """The same, of anything."""
        size = math.prod(shape)
        if use not in self._arrays or self._arrays[use].size < size:
            self._arrays[use] = np.empty(size)
        return self._arrays[use][:size].reshape(shape)


def unit_count(axis: UnitAxis | None, rows: int, cols: int) -> int:
    """How many units rows of a tensor have; 1 for a tensor without units."""
    return {None: 1, "row": rows, "column": cols, "element": rows * cols}[axis]


def by_unit(values: Doubles, axis: UnitAxis | None, shape: tuple[int, ...]) -> Doubles:
    """One value for each unit, in a shape that broadcasts to that of the rows."""
    shapes: dict[UnitAxis | None, tuple[int, ...]] = {
        None: (1, 1),
        "row": (-1, 1),
        "column": (1, -1),
        "element": shape,
    }
    return values.reshape(shapes[axis])


def accumulate(total: Doubles, chunk: ModelChunk, reader: UpdateReader, piece: UpdateChunk, weight: float) -> None:
    """total += weight * U; hashes and measures U on the way. Raises RefusedUpdate for NaN and infinity."""
    read, tensor = piece.read, chunk.task.plan
    reader.hash(read)
    axis, index = rows_as_units(tensor, reader.update.axis(tensor), piece, chunk.rows)
    squares = arithmetic.add(total, read.values, read.dtype, index, axis, weight)
    reader.measure(tensor, chunk.first, squares, read.values.size)


def rows_as_units(
    tensor: TensorPlan, axis: UnitAxis | None, piece: UpdateChunk, rows: int
) -> tuple[UnitAxis | None, NDArray[np.int64]]:
    """Axis and index of a piece of U; of a matrix without units all rows, so that its largest row is found."""
    if axis is None and len(tensor.shape) > 1:
        return "row", np.arange(rows, dtype=np.int64)
    return axis, piece.part.index


class ChunkSum:
    """The sum of all updates over one chunk of the model: Σ n_k Δ_k [rows, cols] and Σ n_k for each unit.

    Args:
        clients: how many updates there are.
    """

    def __init__(self, chunk: ModelChunk, scratch: Scratch, clients: int) -> None:
        self._chunk = chunk
        self._scratch = scratch
        self._total = scratch.zeros("total", chunk.values.shape)
        self._examples = np.zeros(unit_count(chunk.task.plan.axis, *self._total.shape))
        self._kept: list[tuple[UpdateReader, UpdateChunk]] = []
        self._kept_rows = chunk.rows if clients <= KEPT else -(-chunk.rows * KEPT // clients)

    def add(self, reader: UpdateReader, piece: UpdateChunk, weight: float, factor: float) -> None:
        """Add one client's Δ_k, `factor` times, as one of `weight` examples. Raises RefusedUpdate for NaN, infinity."""
        update, tensor = reader.update, self._chunk.task.plan
        accumulate(self._total, self._chunk, reader, piece, weight * factor / update.scale(tensor))
        self._examples[piece.part.index if update.axis(tensor) else slice(None)] += weight
        self._kept.append((reader, first_rows(piece, update.axis(tensor), self._kept_rows, *self._total.shape)))

    def subtract(self, reader: UpdateReader, piece: UpdateChunk, weight: float) -> None:
        """Take `weight` times the control's Δ off every client's: times the examples of those who saw the unit."""
        drift, tensor = self._scratch.zeros("drift", self._total.shape), self._chunk.task.plan
        accumulate(drift, self._chunk, reader, piece, 1.0 / reader.update.scale(tensor))
        arithmetic.subtract(self._total, drift, self._examples, tensor.axis, weight)

    @property
    def covered(self) -> int:
        """Number of elements that at least one client trained."""
        return int(np.count_nonzero(self._examples)) * (self._total.size // max(1, self._examples.size))

    def compare(self) -> None:
        """Measure how each update points in comparison with their average."""
        rows, axis = self._kept_rows, self._chunk.task.plan.axis
        divisors = by_unit(self._examples, axis, self._total.shape)[:rows]
        mean = self._scratch.empty("mean", (rows, self._total.shape[1]))
        np.divide(self._total[:rows], np.where(divisors > 0, divisors, 1.0), out=mean)
        for reader, piece in self._kept:
            compare(mean, self._chunk.task.plan, reader, piece)
        self._kept.clear()

    def move(self, rate: float, examples: float | None) -> None:
        """W' = W + η Δ in place.

        Args:
            rate: η. examples: what to divide by; None divides each unit by the examples of the clients that saw it.

        Raises:
            RefusedUpdate: the result is not finite.
        """
        divisors = self._examples
        if examples is not None:
            divisors = np.where(divisors > 0, examples, 0.0)
        move(self._chunk, self._total, divisors, rate)


def move(chunk: ModelChunk, total: Doubles, divisors: Doubles, rate: float) -> None:
    """W' = W + rate * total / divisors in place, unit by unit; a divisor of 0 keeps the unit.

    Raises:
        RefusedUpdate: the result is not finite.
    """
    task = chunk.task
    bad = arithmetic.step(chunk.values, chunk.residual, task.tensor.dtype, total, divisors, task.plan.axis, rate)
    if bad:
        raise RefusedUpdate(
            f"the merged tensor would hold {bad} infinite or NaN values",
            where=task.name,
            hint="an update is poisoned, or --server-lr is too large",
        )
