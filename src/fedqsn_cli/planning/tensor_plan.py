"""What the plan says about one tensor, and what its units are.

A masked tensor is seen as three-dimensional, its `view` is (lead, rows, cols); only expert stacks have lead > 1.

    axis      a unit is
    row       one row of one lead slice
    column    one column of one lead slice
    element   one number
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

MaskAxis = Literal["neuron", "input", "element"]  # of --axis
Where = Literal["all", "outputs", "mlp", "attention"]  # of --where
UnitAxis = Literal["row", "column", "element"]
View = tuple[int, int, int]

MASK_AXES: tuple[MaskAxis, ...] = get_args(MaskAxis)

TRANSPOSED: dict[UnitAxis, UnitAxis] = {"row": "column", "column": "row", "element": "element"}
"""The axis of the same units in the transposed matrix."""


def units_per_slice(axis: UnitAxis, view: View) -> int:
    """Number of units in one lead slice."""
    _, rows, cols = view
    return {"row": rows, "column": cols, "element": rows * cols}[axis]


def elements_per_unit(axis: UnitAxis, view: View) -> int:
    """Number of elements in one unit."""
    _, rows, cols = view
    return {"row": cols, "column": rows, "element": 1}[axis]


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What happens to one tensor.

    Args:
        dtype, shape: as in the checkpoint, before packing.
        role: a role of rules.toml, or "bias", or "unknown".
        axis: what its units are; None for a tensor that is not masked.
        view: (lead, rows, cols), in which its units are seen.
        groups: names of its masks, one for each lead slice; tensors that name the same group share its mask.
        units: number of units of each group.
        masked, quantized: what is done with it.
        packable: whether transformers can load it packed by bitsandbytes.
        origin: what decided: "rules", and the overrides that matched, as in "rules, rule 2".
        cleared: an override makes visible what the rules would hide, or do not know.
        p1: share of its units that the server hides; None for the job's.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: str
    axis: UnitAxis | None
    view: View
    groups: tuple[str, ...]
    units: int
    masked: bool
    quantized: bool
    packable: bool
    origin: str = "rules"
    cleared: bool = False
    p1: float | None = None

    def elements(self, units: int) -> int:
        """Number of elements in `units` units of each of its groups; 0 for a tensor that is not masked."""
        return 0 if self.axis is None else units * len(self.groups) * elements_per_unit(self.axis, self.view)

    def deciding(self) -> list[Any]:
        """All that decides the tensor's masks; a ratio is in it only where the plan sets one."""
        row = [self.name, list(self.shape), self.role, self.axis, list(self.groups), self.units, self.masked]
        return row if self.p1 is None else [*row, self.p1]
