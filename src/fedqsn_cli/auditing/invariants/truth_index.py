"""The truth as sketches of all its rows and columns, by length, and which of them are hidden."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.auditing.inputs import Inputs
from fedqsn_cli.auditing.invariants.sketches import SHORTEST, Sketches, of_columns, of_rows, window
from fedqsn_cli.auditing.rows import as_float32
from fedqsn_cli.export.pipeline import CHUNK_ELEMENTS
from fedqsn_cli.masks.job_masks import ServerMasks
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.models.tensor_task import TensorTask, tensor_tasks
from fedqsn_cli.planning.tensor_plan import TensorPlan, View
from fedqsn_cli.quantization.layout import TensorLayout

Array = NDArray[Any]
Floats = NDArray[np.float32]
Read = Callable[[int, int, slice], Floats]
"""(first row, rows, columns) -> fp32 [rows, columns]."""


@dataclass
class MatrixSketches:
    """What sketches of all rows and columns of a matrix are made from, run of rows by run of rows, in any order.

    Args:
        view: its `matrix_view` as it comes. turned: is that the transpose of the stored one?
        dtype: of the numbers.
    """

    view: View
    turned: bool = False
    dtype: str = "F32"
    _rows: dict[int, Floats] = field(default_factory=dict)
    _columns: dict[tuple[int, int], Floats] = field(default_factory=dict)

    def take(self, first: int, x: Array) -> None:
        """Rows from `first` on, [n, cols] as they are stored; of a bias, units [n, 1], whole rows of them."""
        _, rows, cols = self.view
        if x.shape[1] != cols:
            first, x = first // cols, x.reshape(-1, cols)
        if cols >= SHORTEST:
            self._rows[first] = of_rows(x, self.dtype)
        if rows >= SHORTEST:
            low, high = window(rows)
            for part in range(first // rows, -(-(first + len(x)) // rows)):
                top = part * rows + low
                begin, end = max(first, top), min(first + len(x), top + high - low)
                if begin < end:
                    part_of_columns = x[begin - first : end - first]
                    self._columns[part, begin] = of_columns(part_of_columns, self.dtype, begin - top, high - low)

    def add_to(self, by_length: dict[int, Sketches], number: int) -> None:
        """Add the sketches; `number` says where they come from."""
        _, rows, cols = self.view
        for first, projected in sorted(self._rows.items(), key=lambda item: item[0]):
            of_rows = by_length.setdefault(cols, Sketches())
            of_rows.add(projected, _width(cols), origins(number, int(self.turned), first, len(projected)))
        columns: dict[int, Floats] = {}
        for (part, _), projected in sorted(self._columns.items(), key=lambda item: item[0]):
            columns[part] = columns[part] + projected if part in columns else projected
        for part, projected in columns.items():
            where = origins(number, 1 - int(self.turned), part * cols, cols)
            by_length.setdefault(rows, Sketches()).add(projected, _width(rows), where)


class TruthIndex:
    """All rows and columns of the truth, sketched; it looks at the weights as they are read (`TruthPass`).

    Attributes:
        tasks: its tensors, whose number is part of where a vector comes from.
    """

    def __init__(self, inputs: Inputs, truth: OpenModel) -> None:
        self.tasks = tensor_tasks(truth, None, lambda tensor: _hidden_units(inputs, tensor))
        self._sketches: dict[int, Sketches] = {}
        self._model = truth
        self._matrices: dict[str, MatrixSketches] = {}
        self._stacked: dict[int, tuple[Floats, Array, Array]] = {}

    def take(self, task: TensorTask, first: int, stored: Array) -> None:
        """Look at rows of a tensor."""
        turned = task.layout.transposed
        new = MatrixSketches(matrix_view(task.layout.view), turned, task.tensor.dtype)
        self._matrices.setdefault(task.name, new).take(first, stored.T if turned else stored)

    def settle(self) -> None:
        """All rows were seen."""
        for number, task in enumerate(self.tasks):
            matrix = self._matrices.pop(task.name, None)
            if matrix is not None:
                matrix.add_to(self._sketches, number)

    def find(self, names: Iterable[str]) -> Iterator[tuple[int, str]]:
        """Number and name of those of these tensors that the truth has."""
        numbers = {task.name: number for number, task in enumerate(self.tasks)}
        return ((numbers[name], name) for name in names if name in numbers)

    def lengths(self) -> list[int]:
        """Lengths of which there is a hidden vector."""
        lengths = sorted(self._sketches.keys() | self._stacked.keys())
        return [length for length in lengths if self.stacked(length)[2].any()]

    def stacked(self, length: int) -> tuple[Floats, Array, Array]:
        """Sketches of one length, where they come from [n, 3], and whether each is (in part) hidden [n]."""
        if length not in self._stacked:
            vectors, where = self._sketches.pop(length, Sketches()).stacked()
            self._stacked[length] = vectors, where, self._hidden(where)
        return self._stacked[length]

    def _hidden(self, where: Array) -> Array:
        hidden = np.zeros(len(where), np.bool_)
        numbers, begins = np.unique(where[:, 0], return_index=True)  # vectors are in the order of tensors
        for number, begin, end in zip(numbers, begins, np.append(begins, len(where))[1:], strict=True):
            mask = self.tasks[number].hidden
            if mask is not None:
                kinds, index = where[begin:end, 1], where[begin:end, 2]
                rows, columns = hidden_vectors(mask)
                of_row, of_column = rows[index % max(1, len(rows))], columns[index % max(1, len(columns))]
                hidden[begin:end] = np.where(kinds == 0, of_row, of_column)
        return hidden

    def is_partially_hidden(self, number: int) -> bool:
        """Is a vector of this tensor hidden in part only (single weights as units, biases)?"""
        hidden = self.tasks[number].hidden
        return hidden is not None and (hidden.axis == "element" or hidden.view[2] == 1)

    def reader(self, number: int) -> Read:
        """Reads rows of a tensor of the truth."""
        task = self.tasks[number]
        raw = TensorLayout("raw", "flat", False, matrix_view(task.layout.view), None)
        as_stored = TensorTask(task.plan, task.tensor, raw, None)

        def read(first: int, rows: int, columns: slice) -> Floats:
            x = self._model.read_rows(task.name, raw, first, rows)[:, columns]
            return np.asarray(as_float32(as_stored, np.ascontiguousarray(x)))

        return read

    def vector(self, number: int, kind: int, index: int) -> Floats:
        """A row or a column of a tensor of the truth."""
        return fetch(self.reader(number), matrix_view(self.tasks[number].layout.view), kind, index)


def matrix_view(view: View) -> View:
    """A bias, [n, 1] as units see it, is one row."""
    lead, rows, cols = view
    return (1, lead, rows) if cols == 1 else view


def hidden_vectors(mask: UnitMask) -> tuple[Array, Array]:
    """Flags of rows [lead * rows] and of columns [lead * cols] of the matrix view: hidden, or hidden in part."""
    lead, rows, cols = mask.view
    if cols == 1:
        return np.asarray(mask.flags.reshape(lead, rows).any(axis=1)), np.zeros(rows * lead, np.bool_)
    if mask.axis == "row":
        return mask.flags, np.zeros(lead * cols, np.bool_)
    if mask.axis == "column":
        return np.zeros(lead * rows, np.bool_), mask.flags.reshape(-1)
    return np.asarray(mask.flags.reshape(lead * rows, cols).any(axis=1)), np.zeros(lead * cols, np.bool_)


def fetch(read: Read, view: View, kind: int, index: int) -> Floats:
    """A row or a column, read by runs of rows."""
    _, rows, cols = view
    if kind == 0:
        return read(index, 1, slice(None)).reshape(-1)
    begin, column = index // cols * rows, index % cols
    step = max(1, CHUNK_ELEMENTS // cols)
    only = slice(column, column + 1)
    parts = [read(first, min(step, begin + rows - first), only) for first in range(begin, begin + rows, step)]
    return np.concatenate(parts).reshape(-1)


def _width(length: int) -> int:
    low, high = window(length)
    return high - low


def origins(number: int, kind: int, first: int, count: int) -> Array:
    """Where vectors come from, as `Sketches` takes it: [count, 3]."""
    where = np.empty((count, 3), np.int32)
    where[:, 0], where[:, 1], where[:, 2] = number, kind, np.arange(first, first + count)
    return where


def _hidden_units(inputs: Inputs, tensor: TensorPlan) -> UnitMask | None:
    """What the server hides of a tensor; without the key, what none of the proxies shows."""
    if inputs.job is not None:
        return ServerMasks(inputs.job).hidden(tensor)
    masks = [proxy.visible(tensor.name) for proxy in inputs.proxies]
    known = [mask for mask in masks if mask is not None]
    if not known:
        return None
    marks = ~np.logical_or.reduce([mask.flags for mask in known])
    return UnitMask(known[0].axis, known[0].view, marks) if marks.any() else None
