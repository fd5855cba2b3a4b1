"""What is measured of every update while its values are read: norms of all, of each tensor and of the largest units.

Norms are of Δ_k = U_k / s_k, over what the client saw. A tensor or unit is held against the size of the weights: its
root mean square over that of the tensor's visible weights, or over that of all matrices' where they are larger (a bias
of zeros has no size of its own). So one poisoned neuron is found, however small its share of the whole is.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.artifacts.partial_folder import MovementRecord
from fedqsn_cli.merging.sums.arithmetic import PieceSquares
from fedqsn_cli.models.tensor_task import TensorTask
from fedqsn_cli.planning.tensor_plan import TensorPlan, UnitAxis

Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Movement:
    """What of a model an update moves furthest in proportion to the weights: a tensor, or a unit of one.

    Args:
        unit: which unit of the tensor; None for all of it.
        ratio: root mean square of its Δ over that of the weights.
    """

    tensor: str
    unit: int | None
    ratio: float

    @classmethod
    def of(cls, record: MovementRecord) -> Movement:
        """What a partial sum recorded of an update in it."""
        return cls(record.tensor, record.unit, record.ratio)

    @property
    def record(self) -> MovementRecord:
        """As a partial sum records it."""
        return MovementRecord(tensor=self.tensor, unit=self.unit, ratio=self.ratio)


class ModelSizes:
    """Sums of squares of a model's visible weights, tensor by tensor."""

    def __init__(self) -> None:
        self._tensors: dict[str, tuple[float, int]] = {}
        self._matrices: set[str] = set()

    def add(self, task: TensorTask, squares: float, count: int) -> None:
        """Some rows of a float tensor: `count` visible weights."""
        before, known = self._tensors.get(task.name, (0.0, 0))
        self._tensors[task.name] = before + squares, known + count
        if len(task.plan.shape) > 1:
            self._matrices.add(task.name)

    @property
    def squares(self) -> float:
        """Sum of squares of all visible weights."""
        return math.fsum(squares for squares, _ in self._tensors.values())

    def references(self) -> Doubles:
        """What each float tensor's Δ is held against: a root mean square of weights, in the order of the pass.

        Infinite for a model of zeros, in proportion to which nothing can be measured.
        """
        squares, counts = (np.array(column, np.float64) for column in zip(*self._tensors.values(), strict=True))
        own = np.sqrt(squares / np.maximum(counts, 1))
        among = np.array([name in self._matrices or not self._matrices for name in self._tensors])
        usual = math.sqrt(squares[among].sum() / max(counts[among].sum(), 1))
        return np.maximum(own, usual or math.inf)

    @property
    def names(self) -> list[str]:
        """The float tensors, in the order of the pass."""
        return list(self._tensors)


class UpdateMeasures:
    """What is measured of one update, in the order of the pass: a few numbers for each tensor are kept.

    Attributes:
        dot, own_squares, mean_squares: products of Δ_k with the merged step, with itself, and of that step with
            itself, over what the client saw and the cosine is measured on.
    """

    def __init__(self) -> None:
        self._squares, self._seen = array("d"), array("d")
        self._tops, self._units = array("d"), array("q")
        self._name = ""
        self._columns = np.zeros(0)
        self._column_rows = 0
        self.dot = self.mean_squares = self.own_squares = 0.0

    def add(self, tensor: TensorPlan, first: int, sums: PieceSquares, count: int, axis: UnitAxis | None) -> None:
        """The next piece of Δ_k: `count` numbers, from row `first` of the tensor on."""
        if self._name != tensor.name:
            self._name = tensor.name
            for column in (self._squares, self._seen, self._tops):
                column.append(0.0)
            self._units.append(0)
            self._column_rows = 0
        self._squares[-1] += sums.total
        self._seen[-1] += count
        if axis == "column":
            self._add_columns(tensor, first, sums)
        elif sums.units.size:
            best = int(sums.units.argmax())
            start = first * tensor.view[2] if sums.width == 1 else first
            self._found(float(sums.units[best]) / sums.width, start + int(sums.places[best]))

    def compare(self, own: float, dot: float, mean: float, *, scale: float) -> None:
        """Sums of products of U with itself, of U with the merged step, and of that step with itself."""
        self.own_squares += own / scale**2
        self.dot += dot / scale
        self.mean_squares += mean

    def _add_columns(self, tensor: TensorPlan, first: int, sums: PieceSquares) -> None:
        """Columns go on in the next rows; the last rows of a lead slice complete them."""
        _, rows, cols = tensor.view
        self._columns = self._columns + sums.units if self._column_rows else sums.units
        self._column_rows += sums.width
        if self._column_rows == rows:
            if sums.units.size:
                best = int(self._columns.argmax())
                self._found(float(self._columns[best]) / rows, first // rows * cols + int(sums.places[best]))
            self._column_rows = 0

    def _found(self, mean_square: float, unit: int) -> None:
        if mean_square > self._tops[-1]:
            self._tops[-1], self._units[-1] = mean_square, unit

    @property
    def squares(self) -> float:
        """‖Δ_k‖², over everything that was measured so far."""
        return math.fsum(self._squares)

    @property
    def seen(self) -> int:
        """Numbers that U holds."""
        return int(math.fsum(self._seen))

    @property
    def cosine(self) -> float | None:
        """Of Δ_k and the merged step; None where one of them is zero."""
        norms = math.sqrt(self.own_squares) * math.sqrt(self.mean_squares)
        return max(-1.0, min(1.0, self.dot / norms)) if norms > 0 else None

    def largest(self, sizes: ModelSizes) -> tuple[Movement, Movement]:
        """The tensor and the unit that move furthest in proportion to the weights."""
        references, names = sizes.references(), sizes.names
        whole = np.sqrt(np.array(self._squares) / np.maximum(np.array(self._seen), 1)) / references
        units = np.sqrt(np.array(self._tops)) / references
        at, of = int(whole.argmax()), int(units.argmax())
        return Movement(names[at], None, float(whole[at])), Movement(names[of], self._units[of], float(units[of]))
