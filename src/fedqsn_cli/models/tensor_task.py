"""One tensor of a model with all that decides how it is processed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from fedqsn_cli.artifacts.manifests import Quantization
from fedqsn_cli.dtypes import DTYPES
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.models.model import ModelTensor, OpenModel
from fedqsn_cli.planning.tensor_plan import TensorPlan
from fedqsn_cli.quantization.layout import TensorLayout, layout_of

_ORDER = {name: position for position, name in enumerate(DTYPES)}


@dataclass(frozen=True, slots=True)
class TensorTask:
    """One tensor on its way: what the plan says, how it is stored, and who says which units the server hides."""

    plan: TensorPlan
    tensor: ModelTensor
    layout: TensorLayout
    hides: Callable[[TensorPlan], UnitMask | None] | None

    @property
    def hidden(self) -> UnitMask | None:
        """Hidden units, in the stored view; None when nothing is. Not kept here: it may be as large as the tensor."""
        return self.hides(self.plan) if self.hides else None

    @property
    def name(self) -> str:
        """Name of the tensor."""
        return self.plan.name

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.plan.shape)


def tensor_tasks(
    model: OpenModel, how: Quantization | None, hidden: Callable[[TensorPlan], UnitMask | None]
) -> list[TensorTask]:
    """Decide for every tensor how it goes through a pass.

    The order is that of the safetensors library (wide dtypes first, then names): shards change nothing, and an
    unchanged model is written as the library would write it.
    """

    def place(tensor: TensorPlan) -> tuple[int, str]:
        packed = layout_of(tensor, how).kind == "pack8"  # int8 codes do not tell what dtype they were made of
        return _ORDER["I8" if packed else tensor.dtype], tensor.name

    return [
        TensorTask(tensor, model.tensors[tensor.name], layout_of(tensor, how), hidden)
        for tensor in sorted(model.plan.tensors, key=place)
    ]
