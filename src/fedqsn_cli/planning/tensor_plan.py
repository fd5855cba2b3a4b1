"""What the plan says about one tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

Axis = Literal["neuron", "input", "element"]
Where = Literal["all", "outputs", "mlp", "attention"]

UnitAxis = Literal["row", "column", "element"]

AXES: tuple[str, ...] = get_args(Axis)

_TURNED: dict[str, UnitAxis] = {"row": "column", "column": "row"}


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What happens to one tensor.

    A masked tensor is seen as three-dimensional, `view` = (lead, rows, cols). Its units lie along the rows (`axis`
    row), along the columns (column), or are the single weights (element). `groups` names one mask per lead slice, each
    of `units` units; tensors that name the same group share its mask. `p1` is the ratio that the server hides of them,
    None for the job's.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: str
    axis: UnitAxis | None
    view: tuple[int, int, int]
    groups: tuple[str, ...]
    units: int
    masked: bool
    quantized: bool
    packable: bool
    origin: str = "rules"  # what decided: "rules", or also the overrides that matched, as in "rules, rule 2"
    cleared: bool = False  # an override sends in the clear what the rules would hide, or do not know
    p1: float | None = None

    def deciding(self) -> list[Any]:
        """All that decides the tensor's masks; a ratio is in it only where the plan sets one."""
        row = [self.name, list(self.shape), self.role, self.axis, list(self.groups), self.units, self.masked]
        return row if self.p1 is None else [*row, self.p1]
