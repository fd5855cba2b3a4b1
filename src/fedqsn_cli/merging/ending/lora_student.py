"""`consolidate --method lora`: adapters on the student in 4 bits, added to the restored model as a merge adds them.

restored model ──nf4──▶ student, packed: what is in memory
│                   └──▶ adapters, trained in fp32
└──── W + scaling · B A ◀──┘     chunk by chunk, from the disk, rounded once
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedqsn_cli.checkpoint import ArtifactWriter
from fedqsn_cli.errors import InputError
from fedqsn_cli.export.pipeline import CHUNK_ELEMENTS
from fedqsn_cli.export.server_model import quantize
from fedqsn_cli.merging.ending.restore import RestoreInputs, write_restored
from fedqsn_cli.merging.ending.students import stored_bits
from fedqsn_cli.merging.step.chunks import Sink
from fedqsn_cli.merging.sums import stepping
from fedqsn_cli.merging.updates.products import product
from fedqsn_cli.models.model import OpenModel, open_model
from fedqsn_cli.models.stored_model import load_stored
from fedqsn_cli.models.tensor_task import TensorTask
from fedqsn_cli.models.torch_model import Loaded
from fedqsn_cli.options import ConsolidateOptions, QuantizeOptions
from fedqsn_cli.progress import Progress
from fedqsn_cli.quantization.layout import row_chunks
from fedqsn_cli.training.methods.lora import LoraMethod
from fedqsn_cli.training.steps.compact import VisibleParameters

Doubles = NDArray[np.float64]


@dataclass(slots=True)
class LoraStudent:
    """A `Student` of which adapters are trained.

    Args:
        method: the adapters, and modules that are trained in full beside them.
        restored: the restored model on the disk. inputs: what it was restored from, with its tensors in order.
    """

    loaded: Loaded
    method: LoraMethod
    restored: OpenModel
    inputs: RestoreInputs

    @classmethod
    def of(
        cls,
        folder: Path,
        inputs: RestoreInputs,
        options: ConsolidateOptions,
        device: torch.device,
        progress: Progress,
    ) -> LoraStudent:
        """The restored model with λ = `options.blend`.

        Args:
            folder: of the restored model and of the same in 4 bits; they are made if they are missing.
        """
        restored, packed = folder / "restored", folder / "packed"
        if not packed.is_dir():
            with ArtifactWriter(restored, force=False, digest=None) as writer:
                write_restored(writer, inputs, options.blend, options.max_shard_bytes, progress)
            quantize(restored, QuantizeOptions(packed, format="nf4"), progress=progress)
        model = open_model(str(packed))
        assert model.manifest is not None
        loaded = load_stored(model.checkpoint, model.manifest.quantization, torch.float32)
        loaded.model.to(device)
        method = LoraMethod.on(model.checkpoint, loaded, {}, options, options.seed, device)
        return cls(loaded, method, open_model(str(restored)), inputs)

    def trainable(self) -> VisibleParameters:
        """The adapters, and a classifier's head or other modules that are trained in full."""
        return self.method.trainable()

    def write(self, sink: Sink) -> None:
        """Write the restored model with the products of the adapters added."""
        factors, saved = self.method.factors(), self.method.saved()
        for task in self.inputs.tasks:
            if task.name in saved:
                sink.write(task.name, 0, stored_bits(task.name, saved[task.name], task.tensor.dtype))
                continue
            offset = 0
            for first, rows in row_chunks(task.layout, 1, CHUNK_ELEMENTS):
                values = self.restored.read_rows(task.name, task.layout, first, rows)
                if task.name in factors:
                    _add(values, task, *_rows(factors[task.name], first, rows), self.method.scaling)
                sink.write(task.name, offset, values)
                offset += values.nbytes


def _rows(factors: tuple[Tensor, Tensor, bool], first: int, rows: int) -> tuple[Doubles, Doubles]:
    """Left [rows, rank] and right [rank, cols] factor of rows of U, which is turned where the tensor is [in, out]."""
    a, b, transposed = factors
    left, right = (a.t(), b.t()) if transposed else (b, a)
    return left[first : first + rows].double().cpu().numpy(), right.double().cpu().numpy()


def _add(values: NDArray[Any], task: TensorTask, left: Doubles, right: Doubles, scaling: float) -> None:
    """W += scaling · left right, in place. Raises InputError where the result is not finite."""
    total = product(left, right, scaling).astype(np.float64)
    if stepping.step(values, None, task.tensor.dtype, total, np.ones(1), None, 1.0):
        raise InputError("the result is not finite", where=task.name, hint="lower --lr")
