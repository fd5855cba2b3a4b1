"""The truth as sketches of all its rows and columns, by length, and which of them are hidden."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.auditing.inputs import Inputs
from fedqsn_cli.auditing.invariants.sketches import SHORTEST, Sketches, joined, of_columns, of_rows, window
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


class Part(NamedTuple):
    """Vectors of one length.

    Args:
        vectors: their sketches. where: they come from, [n, 3]. hidden: whether each is, at least in part, [n].
    """

    vectors: Floats
    where: Array
    hidden: Array

    def only(self, flags: Array) -> Part:
        """Some of them."""
        return Part(self.vectors[flags], self.where[flags], self.hidden[flags])


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

    def take(self, first: int, x: Array) -> int:
        """Rows from `first` on, [n, cols] as they are stored; of a bias, units [n, 1], whole rows of them.

        Returns:
            Numbers that were taken.
        """
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
        return x.size

    def by_length(self, number: int) -> dict[int, Sketches]:
        """The sketches of all rows and columns, by their length; `number` says where they come from."""
        _, rows, cols = self.view
        parts: defaultdict[int, list[Sketches]] = defaultdict(list)
        for first, projected in sorted(self._rows.items(), key=lambda item: item[0]):
            where = origins(number, int(self.turned), first, len(projected))
            parts[cols].append(Sketches.of(projected, _width(cols), where))
        columns: dict[int, Floats] = {}
        for (part, _), projected in sorted(self._columns.items(), key=lambda item: item[0]):
            columns[part] = columns[part] + projected if part in columns else projected
        for part, projected in columns.items():
            where = origins(number, 1 - int(self.turned), part * cols, cols)
            parts[rows].append(Sketches.of(projected, _width(rows), where))
        return {length: joined(found) for length, found in parts.items()}


class TruthIndex:
    """All rows and columns of the truth, sketched; it looks at the weights as they are read (`TruthPass`).

    Attributes:
        tasks: its tensors, whose number is part of where a vector comes from.
    """

    def __init__(self, inputs: Inputs, truth: OpenModel) -> None:
        self.tasks = tensor_tasks(truth, None, lambda tensor: _hidden_units(inputs, tensor))
        self._numbers = {task.name: number for number, task in enumerate(self.tasks)}
        self._model = truth
        self._matrices: dict[int, MatrixSketches] = {}
        self._left = {number: task.size for number, task in enumerate(self.tasks)}
        self._parts: dict[tuple[int, int], Part] = {}
        self._stacked: dict[int, Part] = {}
        self._lock = Lock()

    def take(self, task: TensorTask, first: int, stored: Array) -> None:
        """Look at rows of a tensor, in any thread; the last of them complete its sketches."""
        number, turned = self._numbers[task.name], task.layout.transposed
        new = MatrixSketches(matrix_view(task.layout.view), turned, task.tensor.dtype)
        matrix = self._matrices.setdefault(number, new)
        taken = matrix.take(first, stored.T if turned else stored)
        with self._lock:
            self._left[number] -= taken
            complete = not self._left[number]
        if complete:
            for length, found in self._matrices.pop(number).by_length(number).items():
                self._parts[length, number] = Part(*found, self._hidden(number, found.where))

    def find(self, names: Iterable[str]) -> Iterator[tuple[int, str]]:
        """Number and name of those of these tensors that the truth has."""
        return ((self._numbers[name], name) for name in names if name in self._numbers)

    def lengths(self) -> list[int]:
        """Lengths of which there is a hidden vector."""
        return sorted({length for (length, _), part in self._parts.items() if part.hidden.any()})

    def parts(self, length: int) -> list[Part]:
        """Vectors of one length, tensor by tensor."""
        return [part for (known, _), part in sorted(self._parts.items(), key=lambda item: item[0]) if known == length]

    def stacked(self, length: int) -> Part:
        """All vectors of one length."""
        if length not in self._stacked:
            self._stacked[length] = joined(self.parts(length))
        return self._stacked[length]

    def _hidden(self, number: int, where: Array) -> Array:
        mask = self.tasks[number].hidden
        if mask is None:
            return np.zeros(len(where), np.bool_)
        rows, columns = hidden_vectors(mask)
        kinds, index = where[:, 1], where[:, 2]
        of_row, of_column = rows[index % max(1, len(rows))], columns[index % max(1, len(columns))]
        return np.asarray(np.where(kinds == 0, of_row, of_column))

    @cached_property
    def partially_hidden(self) -> Array:
        """Of which tensors a vector is hidden in part only (single weights as units, biases): flags by number."""
        masks = (task.hidden for task in self.tasks)
        return np.array([mask is not None and (mask.axis == "element" or mask.view[2] == 1) for mask in masks])

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
