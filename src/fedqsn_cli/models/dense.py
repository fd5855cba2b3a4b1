"""The weights that a checkpoint stands for, as torch tensors: unpacked, turned and scaled, never quantized again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedqsn_cli.artifacts.manifests import ModelManifest, read_manifest
from fedqsn_cli.checkpoint import Checkpoint
from fedqsn_cli.dtypes import DTYPES
from fedqsn_cli.errors import FormatError, InputError
from fedqsn_cli.masks.draw import rescale_factor
from fedqsn_cli.models.model import ModelTensor, model_tensors
from fedqsn_cli.planning.roles import rules
from fedqsn_cli.quantization.bnb_reader import read_scales

TORCH_DTYPES: dict[str, torch.dtype] = {
    dtype.name: getattr(torch, dtype.torch) for dtype in DTYPES.values() if dtype.torch
}


def load_dense(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Read every tensor of a model into memory, under its own name, in its own shape and dtype.

    Packed weights (bitsandbytes nf4, fp4, int8) are unpacked; GPT-2's, which are packed transposed, are transposed
    back. The scale of a server model, n / (n - hidden), is applied; a proxy has it in its weights already.

    Raises:
        FormatError: a packed tensor is malformed. InputError: a dtype that torch does not compute with.
    """
    return dict(DenseTensors(checkpoint))


class DenseTensors(Mapping[str, Tensor]):
    """The tensors that `load_dense` gives, each of them read again whenever it is asked for.

    Args:
        checkpoint: stays open as long as tensors are asked for.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._tensors = model_tensors(checkpoint)
        self._factors = rescale_factors(checkpoint)
        self._kind = (checkpoint.config or {}).get("model_type")

    @property
    def layout(self) -> dict[str, Tensor]:
        """Their shapes and dtypes, as tensors without memory (device "meta")."""
        return {
            name: torch.empty(tensor.shape, dtype=_torch_dtype(self._checkpoint, name, tensor), device="meta")
            for name, tensor in self._tensors.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        logical, factor = self._tensors[name], self._factors.get(name)
        if logical.packing is None:
            tensor = _plain(self._checkpoint, name)
        else:
            tensor = _unpacked(self._checkpoint, name, logical, self._kind)
        return tensor if factor is None else _scaled(tensor, factor)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def rescale_factors(checkpoint: Checkpoint) -> dict[str, np.float32]:
    """What a server model's tensors are to be multiplied by; empty for every other model.

    Raises:
        FormatError: its manifest does not tell.
    """
    if checkpoint.manifest is None:
        return {}
    manifest = read_manifest(checkpoint.path, ModelManifest)
    if manifest.kind == "global-model" or not manifest.rescale:
        return {}
    factors = {}
    for name, units in manifest.tensors.items():
        groups = [manifest.groups[group] for group in units.groups]
        if len({(group.units, group.hidden) for group in groups}) != 1:
            raise FormatError(f"the groups of tensor {name!r} differ", where=checkpoint.path)
        if groups[0].hidden >= groups[0].units:
            raise FormatError(f"no unit of tensor {name!r} is visible", where=checkpoint.path)
        factors[name] = rescale_factor(groups[0].units, groups[0].hidden, 0)
    return factors


def _scaled(tensor: Tensor, factor: np.float32) -> Tensor:
    """Multiplied in fp32 and rounded once, as the owner does it for a proxy."""
    return tensor if factor == 1 else (tensor.float() * float(factor)).to(tensor.dtype)


def _plain(checkpoint: Checkpoint, name: str) -> Tensor:
    entry = checkpoint.entries[name]
    _check_dtype(entry.dtype, f"{entry.file}: {name}")
    return from_stored(checkpoint.read(name), entry.dtype)


def _check_dtype(dtype: str, where: object) -> None:
    if dtype not in TORCH_DTYPES:
        raise InputError(f"tensors of dtype {dtype} cannot be computed with", where=where)


def _torch_dtype(checkpoint: Checkpoint, name: str, tensor: ModelTensor) -> torch.dtype:
    if tensor.packing is None:
        _check_dtype(tensor.dtype, f"{checkpoint.entries[name].file}: {name}")
    return TORCH_DTYPES[tensor.dtype]


def _unpacked(checkpoint: Checkpoint, name: str, logical: ModelTensor, kind: str | None) -> Tensor:
    """A packed weight in its own shape and dtype."""
    from fedqsn_cli.quantization import kernels  # needs a compiler, which who trains packed weights does without

    assert logical.packing is not None
    scales = read_scales(checkpoint, name)
    out = np.empty(logical.packing.shape, DTYPES[logical.dtype].bits)
    try:
        if logical.packing.kind == "pack8":
            kernels.dequantize_int8(checkpoint.read(name), scales.absmax, logical.dtype, out)
        else:
            kernels.dequantize_4bit(
                checkpoint.read(name).reshape(-1),
                scales.absmax,
                format=logical.packing.format,
                block=logical.packing.block,
                dtype=logical.dtype,
                out=out,
            )
    except kernels.NonFinite as error:
        raise FormatError(str(error), where=f"{checkpoint.path}: {name}") from None
    tensor = from_stored(out, logical.dtype)
    role = rules().role(name, 2, kind)
    return tensor.t().contiguous() if role is not None and role.name == "conv1d" else tensor


def from_bytes(data: NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Bytes of a stored tensor as a torch tensor of the same memory. Raises InputError for a dtype that torch lacks."""
    if dtype not in TORCH_DTYPES:
        raise InputError(f"tensors of dtype {dtype} cannot be computed with")
    return torch.from_numpy(data).view(TORCH_DTYPES[dtype]).reshape(shape)


def from_stored(array: NDArray[Any], dtype: str) -> Tensor:
    """A numpy array of stored values or bits as a torch tensor of the same memory."""
    if array.dtype == np.uint16:
        array = array.view(np.int16)
    return torch.from_numpy(array).view(TORCH_DTYPES[dtype])


def to_stored(tensor: Tensor) -> NDArray[Any]:
    """Values of a contiguous tensor on the CPU as they are stored, flat, in its memory; 16-bit floats as uint16."""
    flat = tensor.view(-1)
    return flat.view(torch.int16).numpy().view(np.uint16) if flat.element_size() == 2 else flat.numpy()
