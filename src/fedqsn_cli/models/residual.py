"""What rounding dropped: the part of a 16-bit model that its own dtype cannot hold.

A bf16 weight has 8 significant bits; a step smaller than half of the last one would be lost in every round. `merge`
therefore keeps, next to a 16-bit model, `fedqsn-residual.safetensors`: one BF16 tensor for each F16 or BF16 tensor, the
fp32 result minus the stored weight. The next merge starts from weight + residual. Plain loaders ignore the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.checkpoint import ArtifactWriter, Checkpoint, TensorSink, TensorSpec
from fedqsn_cli.dtypes import SHORT_DTYPES
from fedqsn_cli.errors import FormatError
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.planning.tensor_plan import TensorPlan
from fedqsn_cli.quantization.layout import layout_of, row_chunks

STEM = "fedqsn-residual"
CHUNK = 1 << 21  # elements

Array = NDArray[Any]


def residual_tensors(tensors: Sequence[TensorPlan]) -> list[TensorPlan]:
    """The tensors that have a residual: 16-bit floats."""
    return [tensor for tensor in tensors if tensor.dtype in SHORT_DTYPES]


def residual_specs(tensors: Sequence[TensorPlan]) -> list[TensorSpec]:
    """Stored tensors of a residual, in the order of names."""
    chosen = sorted(residual_tensors(tensors), key=lambda tensor: tensor.name)
    return [TensorSpec(tensor.name, "BF16", tensor.shape) for tensor in chosen]


def residual_sink(writer: ArtifactWriter, tensors: Sequence[TensorPlan]) -> TensorSink | None:
    """A sink for the residual of a model; None for a model without 16-bit floats."""
    specs = residual_specs(tensors)
    return writer.tensors(STEM, specs, max_shard_bytes=None, metadata={}) if specs else None


class Residual:
    """The residual next to a model, or zeros where there is none."""

    def __init__(self, model: OpenModel) -> None:
        self._checkpoint = _open(model.source.path)
        if self._checkpoint is None:
            return
        expected = {spec.name: spec for spec in residual_specs(model.plan.tensors)}
        for name, entry in self._checkpoint.entries.items():
            spec = expected.pop(name, None)
            if spec is None or (entry.dtype, entry.shape) != (spec.dtype, spec.shape):
                raise FormatError("this residual does not belong to the model", where=f"{entry.file}: {name}")
        for name in expected:
            raise FormatError("the residual lacks a tensor", where=f"{model.source.path}: {name}")

    @property
    def exists(self) -> bool:
        """Is there a file?"""
        return self._checkpoint is not None

    def rows(self, name: str, first: int, rows: int, cols: int) -> Array:
        """BF16 bits of rows `first` .. `first + rows`: [rows, cols]."""
        out = np.zeros((rows, cols), np.uint16)
        if self._checkpoint is not None:
            self._checkpoint.read_into(name, first * cols * 2, out)
        return out


def copy_residual(model: OpenModel, writer: ArtifactWriter, hidden: Callable[[TensorPlan], UnitMask | None]) -> None:
    """Let a server model keep the residual of what it shows; nothing to do for a model without one."""
    residual = Residual(model)
    if not residual.exists:
        return
    sink = residual_sink(writer, model.plan.tensors)
    assert sink is not None
    for tensor in sorted(residual_tensors(model.plan.tensors), key=lambda tensor: tensor.name):
        mask, storage = hidden(tensor), layout_of(tensor, None)
        for first, rows in row_chunks(storage, 1, CHUNK):
            cols = storage.view[2]
            values = residual.rows(tensor.name, first, rows, cols)
            if mask is not None:
                mask.overwrite(values, first, None)
            sink.write(tensor.name, first * cols * 2, values)
    sink.close()


def _open(folder: Path) -> Checkpoint | None:
    """The residual beside a model; None where it has none."""
    path = folder / f"{STEM}.safetensors"
    return Checkpoint.open(path) if os.path.lexists(path) else None
