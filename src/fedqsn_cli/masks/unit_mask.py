"""Which units of one tensor are marked (hidden, say), and what that means for its rows, columns, elements and blocks.

Every masked tensor is seen as a matrix of `lead * rows` rows and `cols` columns; expert stacks have lead > 1.

    axis      a unit is                       flags has shape
    row       one row                         [lead * rows]
    column    one column of one lead slice    [lead, cols]
    element   one number                      [lead * rows * cols]
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.planning.tensor_plan import TRANSPOSED, UnitAxis, View, elements_per_unit

Bools = NDArray[np.bool_]
Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class UnitMask:
    """A set of marked units of one tensor.

    Args:
        axis: what a unit is.
        view: (lead, rows, cols) of the tensor.
        flags: one flag a unit, shaped as the table above says.
    """

    axis: UnitAxis
    view: View
    flags: Bools

    @classmethod
    def from_groups(cls, axis: UnitAxis, view: View, groups: list[Bools]) -> UnitMask:
        """From the flags of the tensor's groups: one group, or one a lead slice."""
        lead, _, cols = view
        flat = np.concatenate(groups) if len(groups) > 1 else groups[0]
        return cls(axis, view, flat.reshape(lead, cols) if axis == "column" else flat)

    @property
    def count(self) -> int:
        """Marked elements of the tensor (not units)."""
        return int(np.count_nonzero(self.flags)) * elements_per_unit(self.axis, self.view)

    @property
    def broadcast(self) -> Bools:
        """The flags in a shape that broadcasts to `view`."""
        lead, rows, cols = self.view
        flags: Bools = self.flags.reshape(
            {"row": (lead, rows, 1), "column": (lead, 1, cols), "element": self.view}[self.axis]
        )
        return flags

    def transposed(self) -> UnitMask:
        """The same units of the transposed matrix; for tensors without lead slices."""
        lead, rows, cols = self.view
        if lead != 1:
            raise ValueError("only a plain matrix can be transposed")
        flags = np.ascontiguousarray(self.broadcast[0].T)
        return UnitMask.from_groups(TRANSPOSED[self.axis], (1, cols, rows), [flags.reshape(-1)])

    def inverted(self) -> UnitMask:
        """The units that are not marked."""
        return replace(self, flags=~self.flags)

    def flags_of_rows(self, first: int, count: int) -> Bools:
        """Flags for `count` rows from row `first`: [count] (row), [cols] (column), [count, cols] (element).

        The rows of a column-wise tensor must be in one lead slice.
        """
        lead_rows, cols = self.view[1], self.view[2]
        if self.axis == "row":
            rows: Bools = self.flags[first : first + count]
            return rows
        if self.axis == "column":
            columns: Bools = self.flags[first // lead_rows]
            return columns
        flags: Bools = self.flags[first * cols : (first + count) * cols].reshape(count, cols)
        return flags

    def element_flags(self, first: int, count: int) -> Bools:
        """Flags for the elements of `count` rows from row `first`, in a shape that broadcasts to [count, cols]."""
        flags = self.flags_of_rows(first, count)
        return flags[:, None] if self.axis == "row" else np.atleast_2d(flags)

    def split_flags(self, first: int, count: int) -> tuple[Bools, Bools]:
        """Flags for rows, [count], and for elements, [1, cols] or [count, cols]: an element is marked if both are."""
        flags = self.flags_of_rows(first, count)
        if self.axis == "row":
            return flags, np.ones((1, self.view[2]), np.bool_)
        return np.ones(count, np.bool_), np.atleast_2d(flags)

    def overwrite(self, x: Array, first: int, source: Array | None) -> None:
        """Put zeros, or the same elements of `source`, on the marked elements of rows x ([count, cols], in place)."""
        from fedqsn_cli.kernels import fill

        overwrite = {"row": fill.fill_rows, "column": fill.fill_columns, "element": fill.fill_elements}[self.axis]
        overwrite(x, self.flags_of_rows(first, len(x)), source)

    def select(self, x: Array, first: int) -> Array:
        """The marked elements of rows x ([count, cols]): [k, cols], [count, k] or [k]."""
        flags = self.flags_of_rows(first, len(x))
        taken: Array = x[:, flags] if self.axis == "column" else x[flags]
        return taken

    def count_before(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many marked elements there are before each flat position (C order, 0 .. size)."""
        lead, rows, cols = self.view
        if self.axis == "element":
            return _running(self.flags)[positions]
        row, column = np.divmod(positions, cols)
        if self.axis == "row":
            flags = np.append(self.flags, False)
            before: NDArray[np.int64] = _running(self.flags)[row] * cols + column * flags[row]
            return before
        per_row = np.repeat(self.flags.sum(axis=1), rows)
        within = np.vstack([np.stack([_running(flags) for flags in self.flags]), np.zeros(cols + 1, dtype=np.int64)])
        counts: NDArray[np.int64] = _running(per_row)[row] + within[np.minimum(row // rows, lead), column]
        return counts

    def full_blocks(self, block: int) -> Bools:
        """For each block of `block` elements in C order: are all of its elements marked?"""
        lead, rows, cols = self.view
        if self.axis == "row" and cols and cols % block == 0:
            return np.repeat(self.flags, cols // block)
        if self.axis == "column" and cols and cols % block == 0:
            return np.repeat(self.flags.reshape(lead, 1, -1, block).all(axis=3), rows, axis=1).reshape(-1)
        if self.axis == "element" and self.flags.size % block == 0:
            return np.asarray(self.flags.reshape(-1, block).all(axis=1))
        edges = np.append(np.arange(0, lead * rows * cols, block, dtype=np.int64), lead * rows * cols)
        return np.asarray(np.diff(self.count_before(edges)) == np.diff(edges))


def _running(values: NDArray[Any]) -> NDArray[np.int64]:
    """Sums of the first 0, 1, ... n values: [n + 1]."""
    sums = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum(values, out=sums[1:])
    return sums
