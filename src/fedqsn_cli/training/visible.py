"""Which units a proxy shows, and where they lie in a model's parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedqsn_cli.artifacts.manifests import VISIBLE_TENSORS, ProxyManifest, Units
from fedqsn_cli.checkpoint import Checkpoint
from fedqsn_cli.errors import FormatError, InputError
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.models.torch_model import build_model, stored_tensors

Bools = NDArray[np.bool_]


def read_visible(folder: Path, manifest: ProxyManifest, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, UnitMask]:
    """The visible units of every masked tensor of a proxy, from visible.safetensors.

    Args:
        folder: the proxy.
        manifest: its proxy.json.
        shapes: logical shapes of the proxy's tensors.

    Returns:
        Marks that are True where a unit is visible, by tensor name.

    Raises:
        FormatError: visible.safetensors, proxy.json and the tensors contradict each other.
    """
    path = folder / VISIBLE_TENSORS
    flags: dict[str, Bools] = {}
    with Checkpoint.open(path) as stored:
        if set(stored.entries) != set(manifest.groups):
            raise FormatError("does not hold the groups that proxy.json names", where=path)
        for name, group in manifest.groups.items():
            entry = stored.entries[name]
            if entry.dtype != "U8" or entry.shape != ((group.units + 7) // 8,):
                raise FormatError(f"group {name!r} has another size in proxy.json", where=path)
            flags[name] = _unpack(stored.read(name), group.units, f"{path}: {name}")
    masks = {}
    for name, units in manifest.tensors.items():
        if name not in shapes or math.prod(shapes[name]) != math.prod(units.view):
            raise FormatError(f"tensor {name!r} does not have the shape that proxy.json gives it", where=folder)
        masks[name] = _tensor_mask(name, units, flags, folder)
    return masks


def _unpack(packed: NDArray[Any], units: int, where: str) -> Bools:
    bits = np.unpackbits(packed)
    if bits[units:].any() or not bits[:units].any():
        raise FormatError("no unit is visible, or bits are set behind the last unit", where=where)
    return bits[:units].astype(np.bool_)


def _tensor_mask(name: str, units: Units, flags: Mapping[str, Bools], folder: Path) -> UnitMask:
    lead, rows, cols = units.view
    size = {"row": rows, "column": cols, "element": rows * cols}[units.axis]
    if any(group not in flags for group in units.groups) or len(units.groups) not in (1, lead):
        raise FormatError(f"groups of tensor {name!r} are not those of proxy.json", where=folder)
    groups = [flags[group] for group in units.groups] * (lead // len(units.groups))
    if any(len(group) != size for group in groups):
        raise FormatError(f"groups of tensor {name!r} have another number of units", where=folder)
    if len({int(group.sum()) for group in groups}) > 1:
        raise FormatError(f"slices of tensor {name!r} show different numbers of units", where=folder)
    return UnitMask.from_groups(units.axis, units.view, groups)


def expanded(mask: UnitMask, shape: tuple[int, ...]) -> Tensor:
    """A mask in a tensor's own shape, bool; rows and columns take no memory of their own."""
    return torch.from_numpy(mask.broadcast).expand(mask.view).reshape(shape)


def parameter_masks(
    model: Any, config: Mapping[str, Any], dense: Mapping[str, Tensor], visible: Mapping[str, UnitMask], where: object
) -> dict[str, Tensor]:
    """Where visible units lie in the parameters of a model: masks go through transformers just as weights do.

    Args:
        model: what `build_model` made of `dense`.
        config: the proxy's config.json.
        dense: the proxy's tensors under their own names.
        visible: visible units of masked tensors.

    Returns:
        A bool mask in the shape of the parameter, for each parameter with hidden units.

    Raises:
        InputError: transformers changes a tensor in a way that cannot be undone.
    """
    one = torch.ones((), dtype=torch.bfloat16)
    state: dict[str, Tensor] = {}
    for name, tensor in dense.items():
        if name in visible and not visible[name].flags.all():
            state[name] = expanded(visible[name], tuple(tensor.shape)).to(torch.bfloat16)
        else:
            state[name] = one.expand(tensor.shape) if tensor.is_floating_point() else tensor
    twin = build_model(config, state, where=where, dtype=torch.bfloat16)
    parameters = dict(twin.named_parameters())
    for name, _ in model.named_parameters():
        if name not in parameters:  # equal masks were tied, different weights were not
            raise InputError(f"{name} is tied to a tensor that differs from it, so it cannot be trained", where=where)
    masks = {}
    for name, parameter in parameters.items():
        if not bool(((parameter == 0) | (parameter == 1)).all()):
            raise InputError(f"{name} mixes the tensors of the proxy, so it cannot be trained", where=where)
        if not bool(parameter.all()):
            masks[name] = parameter.detach() != 0
    return masks


def check_round_trip(model: Any, dense: Mapping[str, Tensor], visible: Mapping[str, UnitMask], where: object) -> None:
    """Check that a model gives every tensor back as it came in, bit for bit.

    Raises:
        InputError: it does not, so an update could not be expressed in the proxy's tensors.
    """
    back = stored_tensors(model, dense)
    for name, tensor in dense.items():
        if name not in back and name not in visible:
            continue  # an old buffer, which the architecture has no use for
        if name not in back or back[name].shape != tensor.shape or not torch.equal(back[name].to(tensor.dtype), tensor):
            raise InputError(f"the model does not use {name} as the proxy has it, so it cannot be trained", where=where)
