"""The update that goes back: U = T − P on visible units, tensor by tensor, and its manifest.

T   the trained proxy, P the proxy as it was received, both dense fp32 in the checkpoint's own names and shapes
U   of the shape that `artifacts/update_folder.py` defines
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedqsn_cli.artifacts.manifests import UPDATE_MANIFEST, UPDATE_TENSORS, UpdateManifest, manifest_bytes
from fedqsn_cli.artifacts.update_folder import UPDATE_DTYPES, update_shape
from fedqsn_cli.checkpoint import ArtifactWriter, TensorSpec
from fedqsn_cli.errors import InputError
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.models.dense import TORCH_DTYPES, DenseTensors
from fedqsn_cli.models.torch_model import stored_tensors

UpdateFormat = Literal["fp32", "bf16", "fp16"]

_STEM = UPDATE_TENSORS.removesuffix(".safetensors")


def write_tensors(
    writer: ArtifactWriter,
    model: Any,
    received: DenseTensors,
    visible: Mapping[str, UnitMask],
    update_format: UpdateFormat,
) -> None:
    """Write update.safetensors.

    Args:
        model: the trained model, T.
        received: the proxy's tensors, P; read one by one.
        visible: visible units of masked tensors.
        update_format: precision of the update.

    Raises:
        InputError: a value is not finite in that precision.
    """
    stored_dtype = UPDATE_DTYPES[update_format]
    dtype = TORCH_DTYPES[stored_dtype]
    layout = received.layout
    names = _floats(layout)
    specs = [TensorSpec(name, stored_dtype, _shape(layout[name], visible.get(name))) for name in names]
    sink = writer.tensors(_STEM, specs, max_shard_bytes=None, metadata={"format": "pt"})
    trained = stored_tensors(model, names)
    for name in names:
        sink.write(name, 0, _bits(name, _difference(trained.get(name), received[name], visible.get(name)), dtype))
    sink.close()


def write_manifest(writer: ArtifactWriter, **facts: Any) -> None:
    """Write update.json; `facts` are the fields of UpdateManifest without `files`. Nothing in it is private."""
    files = {UPDATE_TENSORS: writer.digests[UPDATE_TENSORS]}
    writer.add_bytes(UPDATE_MANIFEST, manifest_bytes(UpdateManifest(**facts, files=files)))


def _shape(tensor: Tensor, mask: UnitMask | None) -> tuple[int, ...]:
    """Shape of a tensor's U; `mask` has the visible units."""
    shape = tuple(tensor.shape)
    if mask is None:
        return shape
    return update_shape(shape, mask.axis, mask.view, int(mask.flags.sum()))


def _floats(dense: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that an update has, in their order in the file: that of their names."""
    return sorted(name for name, tensor in dense.items() if tensor.is_floating_point())


def _difference(trained: Tensor | None, before: Tensor, mask: UnitMask | None) -> Tensor:
    """U of one tensor in fp32; zeros for a buffer that the architecture has no use for."""
    if trained is None:
        return torch.zeros(_shape(before, mask))
    started = before.to(trained.dtype)  # what the training began with, should it round weights
    whole = trained.detach().float().cpu() - started.float()
    if mask is None:
        return whole
    lead, rows, cols = mask.view
    flags = torch.from_numpy(mask.flags)
    if mask.axis == "element":
        return whole.reshape(-1)[flags]
    if mask.axis == "row":
        return whole.reshape(lead * rows, cols)[flags]
    return torch.stack([part[:, shown] for part, shown in zip(whole.reshape(mask.view), flags, strict=True)])


def _bits(name: str, update: Tensor, dtype: torch.dtype) -> NDArray[Any]:
    """An update as it is stored, rounded once to nearest even."""
    rounded = update.to(dtype).contiguous()
    if not bool(rounded.isfinite().all()):
        raise InputError(f"the update of {name} is not finite", hint="lower --lr, or use --update-format fp32")
    flat = rounded.reshape(-1)
    bits: NDArray[Any] = flat.numpy() if dtype == torch.float32 else flat.view(torch.int16).numpy().view(np.uint16)
    return bits


def parameters(dense: Mapping[str, Tensor], visible: Mapping[str, UnitMask]) -> int:
    """How many numbers an update holds of a proxy with tensors like these."""
    return sum(math.prod(_shape(dense[name], visible.get(name))) for name in _floats(dense))
