"""How much memory a training takes: what is known before it begins, and what it has taken so far."""

from __future__ import annotations

import math
import re
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedqsn_cli.options import RecipeOptions
from fedqsn_cli.training.steps.compact import Trainable
from fedqsn_cli.training.steps.optimizers import STATE_BYTES


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Memory that a training holds through all steps, in bytes; what forward and backward passes need comes on top.

    Args:
        parameters: numbers in the model. trained: numbers that the optimizer changes.
        weights, gradients, optimizer: bytes of each.
    """

    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int

    @classmethod
    def of(cls, model: Any, trainable: Trainable, recipe: RecipeOptions) -> MemoryPlan:
        """What the parts of a training are going to take."""
        parameters, leaves = list(model.parameters()), trainable.leaves
        trained = sum(leaf.numel() for leaf in leaves)
        gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
        width = gradients / trained / 4 if recipe.optimizer == "adamw" and trained else 1  # moments have that dtype
        return cls(
            parameters=sum(_numbers(parameter) for parameter in parameters),
            trained=trained,
            weights=sum(map(_bytes, parameters)),
            gradients=gradients,
            optimizer=round(STATE_BYTES[recipe.optimizer] * trained * width),
        )

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer

    @property
    def per_parameter(self) -> float:
        """Bytes for each number in the model; a plain AdamW loop in fp32 holds 16."""
        return self.total / max(1, self.parameters)


def _numbers(parameter: Any) -> int:
    """How many numbers a parameter stands for; bitsandbytes packs two of 4 bits into a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def _bytes(parameter: Any) -> int:
    """Memory of a parameter, and of the scales that bitsandbytes keeps beside one that it packed."""
    state = getattr(parameter, "quant_state", None)
    scales = [] if state is None else [state.absmax] + ([state.state2.absmax] if state.nested else [])
    return sum(int(part.nbytes) for part in (parameter, *scales))


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: of this process, or on a GPU of what torch has held there."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    found = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())  # ru_maxrss counts who started it, too
    return int(found[1]) << 10 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
