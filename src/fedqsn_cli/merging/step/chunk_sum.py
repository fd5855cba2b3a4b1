"""One chunk of a step, and of a weighted average: the exact sum of all updates, rounded and added once.

Every update's rows go into the sum and are gone; only of a few updates, or of a few rows of many, are they kept until
the sum is complete, to measure how each of them points.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.errors import RefusedUpdate
from fedqsn_cli.kernels.threads import run_ranges
from fedqsn_cli.merging.step.chunks import ModelChunk
from fedqsn_cli.merging.step.cosines import KEPT, compare, first_rows
from fedqsn_cli.merging.step.noise import Noise
from fedqsn_cli.merging.step.server_optimizer import ServerOptimizer
from fedqsn_cli.merging.sums import arithmetic, stepping
from fedqsn_cli.merging.sums.arithmetic import GRAIN, PieceSquares
from fedqsn_cli.merging.sums.exact_sum import MOST_TERM, Digits
from fedqsn_cli.merging.updates.partial_sum import PartialChunk
from fedqsn_cli.merging.updates.read_update import UpdateChunk, UpdateReader
from fedqsn_cli.planning.tensor_plan import TensorPlan, UnitAxis

Doubles = NDArray[np.float64]


class Scratch:
    """Double-precision arrays that chunks use one after the other."""

    def __init__(self) -> None:
        self._arrays: dict[str, Doubles] = {}

    def zeros(self, use: str, shape: tuple[int, ...]) -> Doubles:
        """An array of zeros; what an earlier call for the same use returned is overwritten."""
        array = self.empty(use, shape)
        flat = array.reshape(-1)
        run_ranges(flat.size, GRAIN, lambda start, stop: flat[start:stop].fill(0))
        return array

    def digits(self, shape: tuple[int, ...]) -> Digits:
        """Exact sums of zero."""
        high, low = (self.zeros(use, shape).view(np.int64) for use in ("high", "low"))
        return Digits(high, low)

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


def accumulate(
    total: Callable[[], Doubles | Digits], chunk: ModelChunk, reader: UpdateReader, piece: UpdateChunk, weight: float
) -> None:
    """total += weight * U; hashes and measures U on the way.

    Args:
        total: asked for unless U is of a tensor that its client did not train.

    Raises:
        RefusedUpdate: for NaN and infinity, and for what is too large for an exact sum.
    """
    read, tensor = piece.read, chunk.task.plan
    reader.hash(read)
    if read.untrained:
        reader.measure(tensor, chunk.first, PieceSquares.of_zeros(chunk.rows), read.values.size)
        return
    axis, index = rows_as_units(tensor, reader.update.axis(tensor), piece, chunk.rows)
    into = total()
    squares = arithmetic.add(into, read.values, read.dtype, index, axis, weight)
    reader.measure(tensor, chunk.first, squares, read.values.size)
    if isinstance(into, Digits):
        require_summable(reader, tensor, weight, squares)


def require_summable(reader: UpdateReader, tensor: TensorPlan, weight: float, squares: PieceSquares) -> None:
    """Refuse a piece of U that may have terms which an exact sum cannot hold. Raises RefusedUpdate."""
    if abs(weight) * math.sqrt(squares.total) >= MOST_TERM:
        what = f"its values, times its number of examples, are beyond {MOST_TERM:.1g}, and cannot be summed exactly"
        raise RefusedUpdate(what, where=f"{reader.update.folder}: {tensor.name}")


def rows_as_units(
    tensor: TensorPlan, axis: UnitAxis | None, piece: UpdateChunk, rows: int
) -> tuple[UnitAxis | None, NDArray[np.int64]]:
    """Axis and index of a piece of U; of a matrix without units all rows, so that its largest row is found."""
    if axis is None and len(tensor.shape) > 1:
        return "row", np.arange(rows, dtype=np.int64)
    return axis, piece.part.index


class ChunkStep:
    """How far one chunk of the model moves: a total, and for each unit what it is divided by.

    Args:
        kept_rows: how many of the rows are compared with each update.
    """

    def __init__(self, chunk: ModelChunk, scratch: Scratch, kept_rows: int) -> None:
        self._chunk = chunk
        self._scratch = scratch
        self._total = scratch.empty("total", chunk.values.shape)  # a subclass fills it, where anything moves
        self._moves = False  # is there anything in the total? Not where nobody trained a tensor
        self._weights = np.zeros(unit_count(chunk.task.plan.axis, *self._total.shape))
        self._kept: list[tuple[UpdateReader, UpdateChunk]] = []
        self._kept_rows = kept_rows

    def subtract(self, reader: UpdateReader, piece: UpdateChunk, weight: float) -> None:
        """Take `weight` times the control's Δ off every client's: times the weights of those who saw the unit."""
        drift, tensor = self._scratch.zeros("drift", self._total.shape), self._chunk.task.plan
        accumulate(lambda: drift, self._chunk, reader, piece, 1.0 / reader.update.scale(tensor))
        if not piece.read.untrained:
            arithmetic.subtract(self._begun(), drift, by_unit(weight * self._weights, tensor.axis, drift.shape))

    @property
    def covered(self) -> int:
        """Number of elements that a client trained."""
        return int(np.count_nonzero(self._weights)) * (self._total.size // max(1, self._weights.size))

    def compare(self) -> None:
        """Measure how each update points in comparison with the step."""
        if self._moves:
            self._compare()
        self._kept.clear()

    def _compare(self) -> None:
        rows, axis = self._kept_rows, self._chunk.task.plan.axis
        weights = by_unit(np.where(self._weights > 0, self._weights, np.inf), axis, self._total.shape)
        total, divisors = self._total[:rows], np.broadcast_to(weights, self._total.shape)[:rows]
        mean = self._scratch.empty("mean", total.shape)

        def work(start: int, stop: int) -> None:
            np.divide(total[start:stop], divisors[start:stop], out=mean[start:stop])

        run_ranges(rows, -(-GRAIN // max(total.shape[1], 1)), work)
        for reader, piece in self._kept:
            compare(mean, self._chunk.task.plan, reader, piece)

    def disturb(self, noise: Noise) -> None:
        """Add noise to the total."""
        noise.add_to(self._begun(), self._chunk.task.name, self._chunk.first * self._chunk.task.layout.view[2])

    def move(self, rate: float, divisor: float | None) -> None:
        """W' = W + η Δ in place.

        Args:
            rate: η. divisor: what to divide by; None divides each unit by the weights of the clients that saw it.

        Raises:
            RefusedUpdate: the result is not finite.
        """
        if self._moves:
            move(self._chunk, self._total, self._divisors(divisor), rate)

    def move_by(self, optimizer: ServerOptimizer, rate: float, divisor: float | None) -> None:
        """The same with what an optimizer makes of Δ."""
        divisors = by_unit(self._divisors(divisor), self._chunk.task.plan.axis, self._total.shape)
        seen = divisors > 0
        total = self._begun()
        np.divide(total, np.where(seen, divisors, np.inf), out=total)
        optimizer.advance(self._chunk, total, seen)
        move(self._chunk, total, (self._weights > 0).astype(np.float64), rate)

    def _begun(self) -> Doubles:
        """The total, which is zeros if nothing was put into it."""
        if not self._moves:
            self._total.fill(0)
            self._moves = True
        return self._total

    def _divisors(self, divisor: float | None) -> Doubles:
        return self._weights if divisor is None else np.where(self._weights > 0, divisor, 0.0)


class ChunkSum(ChunkStep):
    """The weighted sum of all updates over one chunk: Σ w_k Δ_k [rows, cols] and Σ w_k for each unit.

    Args:
        clients: how many updates there are. least: a unit that fewer of them saw stays.
    """

    def __init__(self, chunk: ModelChunk, scratch: Scratch, clients: int, least: int = 1) -> None:
        super().__init__(chunk, scratch, chunk.rows if clients <= KEPT else -(-chunk.rows * KEPT // clients))
        self._digits: Digits | None = None
        self._least = least
        self._count = np.zeros(self._weights.size if least > 1 else 0, np.int64)

    @property
    def digits(self) -> Digits:
        """The exact sums: zeros until something is added."""
        if self._digits is None:
            self._digits = self._scratch.digits(self._total.shape)
        return self._digits

    @property
    def weights(self) -> Doubles:
        """Σ w_k for each unit."""
        return self._weights

    def add(self, reader: UpdateReader, piece: UpdateChunk, weight: float, factor: float) -> None:
        """Add one client's Δ_k, `factor` times, with a weight. Raises RefusedUpdate as `accumulate`."""
        update, tensor = reader.update, self._chunk.task.plan
        accumulate(lambda: self.digits, self._chunk, reader, piece, weight * factor / update.scale(tensor))
        seen = piece.part.index if update.axis(tensor) else slice(None)
        self._weights[seen] += weight
        if self._count.size:
            self._count[seen] += 1
        self._kept.append((reader, first_rows(piece, update.axis(tensor), self._kept_rows, *self._total.shape)))

    def add_partial(self, piece: PartialChunk) -> None:
        """Add what a partial sum has of these rows."""
        self.digits.add(piece.digits)
        self._weights += piece.weights

    def close(self) -> None:
        """Round the sums, and leave units as they are that too few clients saw."""
        if self._digits is not None:
            self._digits.settle(self._total)
            self._moves = True
        if self._count.size:
            self._weights[self._count < self._least] = 0.0


def move(chunk: ModelChunk, total: Doubles, divisors: Doubles, rate: float) -> None:
    """W' = W + rate * total / divisors in place, unit by unit; a divisor of 0 keeps the unit.

    Raises:
        RefusedUpdate: the result is not finite.
    """
    task = chunk.task
    require_finite(
        stepping.step(chunk.values, chunk.residual, task.tensor.dtype, total, divisors, task.plan.axis, rate), task.name
    )


def require_finite(bad: int, tensor: str) -> None:
    """Refuse a result in which some weights are not finite. Raises RefusedUpdate."""
    if bad:
        raise RefusedUpdate(
            f"the merged tensor would hold {bad} infinite or NaN values",
            where=tensor,
            hint="an update is poisoned, or --server-lr is too large",
        )
