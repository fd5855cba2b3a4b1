"""The student of a consolidation: the restored model, and what of it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedqsn_cli.dtypes import WEIGHT_DTYPES
from fedqsn_cli.errors import InputError
from fedqsn_cli.export.outputs import tensor_specs
from fedqsn_cli.merging.ending.restore import RestoreInputs, restore_into
from fedqsn_cli.merging.step.chunks import InMemorySink, Sink
from fedqsn_cli.models.dense import TORCH_DTYPES, from_bytes, to_stored
from fedqsn_cli.models.torch_model import Loaded, load_model, stored_tensors
from fedqsn_cli.progress import Progress
from fedqsn_cli.training.steps.compact import VisibleParameters

Array = NDArray[Any]


class Student(Protocol):
    """A restored model on its device, before or after it was trained."""

    loaded: Loaded

    def trainable(self) -> VisibleParameters:
        """What of it is trained; called once."""

    def write(self, sink: Sink) -> None:
        """Write the whole model as it is now, in the dtypes of the global model."""


@dataclass(slots=True)
class FullStudent:
    """All weights are trained, in fp32."""

    loaded: Loaded
    inputs: RestoreInputs

    @classmethod
    def of(cls, inputs: RestoreInputs, blend: float, device: torch.device, progress: Progress) -> FullStudent:
        """The restored model with λ = `blend`."""
        sink = InMemorySink(tensor_specs(inputs.tasks, None))
        restore_into(sink, None, inputs, blend, progress)
        dense = {}
        for name, spec in sink.specs.items():
            tensor = from_bytes(sink.bytes.pop(name), spec.dtype, spec.shape)
            dense[name] = tensor.float() if tensor.is_floating_point() else tensor
        loaded = load_model(inputs.whole.checkpoint, dense=dense)
        loaded.model.to(device)
        return cls(loaded, inputs)

    def trainable(self) -> VisibleParameters:
        """Every parameter."""
        return VisibleParameters(self.loaded.model, {})

    def write(self, sink: Sink) -> None:
        """Write all tensors, rounded once."""
        whole = self.inputs.whole
        trained = stored_tensors(self.loaded.model, whole.tensors)
        for task in self.inputs.tasks:
            if task.tensor.dtype in WEIGHT_DTYPES and task.name in trained:
                sink.write(task.name, 0, stored_bits(task.name, trained[task.name], task.tensor.dtype))
            else:  # positions, or a buffer that the architecture does not use
                sink.write(task.name, 0, whole.checkpoint.read(task.name).reshape(-1).view(np.uint8))


def stored_bits(name: str, tensor: Tensor, dtype: str) -> Array:
    """A trained tensor as it is stored, rounded once. Raises InputError where it is not finite."""
    rounded = tensor.detach().cpu().to(TORCH_DTYPES[dtype]).contiguous().reshape(-1)
    if not bool(rounded.isfinite().all()):
        raise InputError("the result is not finite", where=name, hint="lower --lr")
    return to_stored(rounded)
