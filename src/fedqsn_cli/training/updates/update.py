"""The update that goes back: U = T − P on visible units, tensor by tensor, and its manifest.

T   the trained proxy, P the proxy as it was received, both dense fp32 in the checkpoint's own names and shapes
U   of the shape that `artifacts/update_folder.py` defines

    U ──clip, add noise──▶ ──add what earlier rounds left over──▶ ──encode──▶ update.safetensors
                                                                     └──▶ what it leaves over
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from fedqsn_cli.artifacts.manifests import UPDATE_MANIFEST, UPDATE_TENSORS, UpdateManifest, manifest_bytes
from fedqsn_cli.artifacts.update_folder import (
    SCALES,
    StoredFormat,
    format_of,
    require_distinct,
    stored_specs,
    update_shape,
)
from fedqsn_cli.checkpoint import ArtifactWriter, TensorSpec
from fedqsn_cli.errors import InputError
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.models.dense import TORCH_DTYPES, DenseTensors, from_stored, to_stored
from fedqsn_cli.models.torch_model import stored_tensors
from fedqsn_cli.options.groups import UpdateFormat
from fedqsn_cli.training.steps.visible import visible_part
from fedqsn_cli.training.updates.error_feedback import ErrorFeedback
from fedqsn_cli.training.updates.update_noise import UpdateNoise

Array = NDArray[Any]

_STEM = UPDATE_TENSORS.removesuffix(".safetensors")


@dataclass(frozen=True, slots=True)
class Differences:
    """U of every float tensor of a proxy.

    Args:
        received: the proxy's tensors, P; read one by one. layout: their shapes and dtypes.
        visible: visible units of masked tensors; empty where every unit was trained.
        trained: tensors of the trained model, T, by the proxy's names. buffers: those of them that nothing trains.
    """

    received: DenseTensors
    layout: Mapping[str, Tensor]
    visible: Mapping[str, UnitMask]
    trained: Mapping[str, Tensor]
    buffers: frozenset[str]

    @classmethod
    def of(cls, model: Any, received: DenseTensors, visible: Mapping[str, UnitMask]) -> Differences:
        """The differences that training made to a model."""
        layout = received.layout
        trained = stored_tensors(model, floats(layout))
        places = {buffer.data_ptr() for buffer in model.buffers()}
        buffers = frozenset(name for name, tensor in trained.items() if tensor.data_ptr() in places)
        return cls(received, layout, visible, trained, buffers)

    @property
    def names(self) -> list[str]:
        """Names of the tensors, in their order in the file."""
        return floats(self.layout)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of U."""
        return _shape(self.layout[name], self.visible.get(name))

    def is_trained(self, name: str) -> bool:
        """Whether the tensor is a parameter; else its U is zeros, whatever the data."""
        return name in self.trained and name not in self.buffers

    def trained_updates(self) -> Iterator[tuple[str, Tensor]]:
        """Names and U of everything that is trained."""
        return ((name, self.update(name)) for name in self.names if self.is_trained(name))

    def update(self, name: str) -> Tensor:
        """U of one tensor in fp32; zeros for a buffer that the architecture has no use for."""
        if name not in self.trained:
            return torch.zeros(self.shape(name))
        trained = self.trained[name].detach()
        started = self.received[name].to(trained.dtype)  # what the training began with, should it round weights
        whole = trained.float().cpu() - started.float()
        return visible_part(whole, self.visible.get(name))


def write_tensors(
    writer: ArtifactWriter,
    differences: Differences,
    update_format: UpdateFormat,
    noise: UpdateNoise | None = None,
    feedback: ErrorFeedback | None = None,
) -> None:
    """Write update.safetensors.

    Args:
        update_format: precision of the update.
        noise: what is done to everything that was trained.
        feedback: gets what this precision leaves over, and gives what it left over before.

    Raises:
        InputError: a value is not finite in that precision.
    """
    formats, specs = stored_as(differences.layout, differences.visible, update_format)
    require_distinct(specs)
    sink = writer.tensors(_STEM, specs, max_shard_bytes=None, metadata={"format": "pt"})
    for name, stored in formats.items():
        update = differences.update(name)
        if noise is not None and differences.is_trained(name):
            update = noise.apply(name, update)
        if feedback is not None:
            update = feedback.added(name, update)
        encoded = encode_update(name, update, stored)
        for part, data in encoded.parts:
            sink.write(part, 0, data)
        if feedback is not None:
            feedback.keep(name, update.reshape(-1) - encoded.decoded())
    sink.close()


def write_manifest(writer: ArtifactWriter, **facts: Any) -> None:
    """Write update.json; `facts` are the fields of UpdateManifest without `files`. Nothing in it is private."""
    writer.add_bytes(UPDATE_MANIFEST, manifest_bytes(UpdateManifest(**facts, files=writer.digests)))


def floats(dense: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that an update has, in their order in the file: that of their names."""
    return sorted(name for name, tensor in dense.items() if tensor.is_floating_point())


def parameters(layout: Mapping[str, Tensor], visible: Mapping[str, UnitMask]) -> int:
    """How many numbers an update holds of a proxy with tensors like these."""
    return sum(math.prod(_shape(layout[name], visible.get(name))) for name in floats(layout))


def stored_as(
    layout: Mapping[str, Tensor], visible: Mapping[str, UnitMask], update_format: UpdateFormat
) -> tuple[dict[str, StoredFormat], list[TensorSpec]]:
    """How each tensor of an update is stored, and all tensors of its file."""
    formats = {name: format_of(update_format, tuple(layout[name].shape)) for name in floats(layout)}
    shapes = {name: _shape(layout[name], visible.get(name)) for name in formats}
    return formats, [spec for name, kind in formats.items() for spec in stored_specs(name, kind, shapes[name])]


def _shape(tensor: Tensor, mask: UnitMask | None) -> tuple[int, ...]:
    """Shape of a tensor's U; `mask` has the visible units."""
    shape = tuple(tensor.shape)
    if mask is None:
        return shape
    return update_shape(shape, mask.axis, mask.view, int(mask.flags.sum()))


@dataclass(frozen=True, slots=True)
class EncodedUpdate:
    """U of one tensor as it is stored: the data of each stored tensor, by its name."""

    parts: tuple[tuple[str, Array], ...]
    stored: StoredFormat
    size: int

    def decoded(self) -> Tensor:
        """The fp32 values that the owner reads: [size]."""
        coding = self.stored.coding
        data = self.parts[0][1]
        if coding is not None:
            from fedqsn_cli.quantization.runs import decode_run  # needs a compiler, which most updates do without

            return torch.from_numpy(decode_run(data, self.parts[1][1], coding.format, coding.block, self.size))
        return from_stored(data, self.stored.dtype).float()


def encode_update(name: str, update: Tensor, stored: StoredFormat) -> EncodedUpdate:
    """An update as it is stored: rounded once to nearest even, or as codes. Raises InputError if it is not finite."""
    coding = stored.coding
    dtype = torch.float32 if coding is not None else TORCH_DTYPES[stored.dtype]
    rounded = update.to(dtype).contiguous().reshape(-1)
    if not bool(rounded.isfinite().all()):
        raise InputError(f"the update of {name} is not finite", hint="lower --lr, or use --update-format fp32")
    if coding is not None:
        from fedqsn_cli.quantization.runs import encode_run

        codes, scales = encode_run(rounded.numpy(), coding.format, coding.block)
        return EncodedUpdate(((name, codes), (name + SCALES, scales)), stored, rounded.numel())
    return EncodedUpdate(((name, to_stored(rounded)),), stored, rounded.numel())
