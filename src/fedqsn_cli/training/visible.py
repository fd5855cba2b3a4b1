"""Which units a proxy shows, and which elements of a model's parameters they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedqsn_cli.artifacts.manifests import ProxyManifest
from fedqsn_cli.artifacts.proxy_folder import open_visible
from fedqsn_cli.errors import InputError
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.models.torch_model import build_model, stored_tensors


def read_visible(folder: Path, manifest: ProxyManifest, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, UnitMask]:
    """The visible units of every masked tensor of a proxy, by tensor name.

    Args:
        folder: the proxy. manifest: its proxy.json.
        shapes: shapes of its tensors, before packing.

    Raises:
        FormatError: visible.safetensors, proxy.json and the tensors contradict each other.
    """
    visible = open_visible(folder, manifest, shapes)
    with visible.stored:
        visible.require_exact()
        return {
            name: UnitMask.from_groups(units.axis, units.view, visible.slices(name))
            for name, units in manifest.tensors.items()
        }


def rescale_factors(manifest: ProxyManifest, visible: Mapping[str, UnitMask]) -> dict[str, float]:
    """s of every masked tensor of a proxy: its weights are s times the model's. Empty where it is 1 for all."""
    if not manifest.rescale:
        return {}
    return {name: float(np.float32(mask.flags.size / np.count_nonzero(mask.flags))) for name, mask in visible.items()}


def visible_part(whole: Tensor, mask: UnitMask | None) -> Tensor:
    """The visible elements of a tensor, in the order of its U; all of them without a mask."""
    if mask is None:
        return whole
    lead, rows, cols = mask.view
    flags = torch.from_numpy(mask.flags)
    if mask.axis == "element":
        return whole.reshape(-1)[flags]
    if mask.axis == "row":
        return whole.reshape(lead * rows, cols)[flags]
    return torch.stack([part[:, shown] for part, shown in zip(whole.reshape(mask.view), flags, strict=True)])


def put_visible(whole: Tensor, mask: UnitMask | None, part: Tensor) -> None:
    """Put elements, in the order of U, on the visible elements of a tensor, which must be contiguous."""
    if mask is None:
        whole.copy_(part.reshape(whole.shape))
        return
    lead, rows, cols = mask.view
    flags = torch.from_numpy(mask.flags)
    if mask.axis == "element":
        whole.view(-1)[flags] = part.reshape(-1)
    elif mask.axis == "row":
        whole.view(lead * rows, cols)[flags] = part.reshape(-1, cols)
    else:
        for target, shown, source in zip(whole.view(mask.view), flags, part.reshape(lead, rows, -1), strict=True):
            target[:, shown] = source


def expanded(mask: UnitMask, shape: tuple[int, ...]) -> Tensor:
    """A mask in a tensor's own shape, bool; rows and columns take no memory of their own."""
    return torch.from_numpy(mask.broadcast).expand(mask.view).reshape(shape)


def parameter_masks(
    model: Any, config: Mapping[str, Any], dense: Mapping[str, Tensor], visible: Mapping[str, UnitMask], where: object
) -> dict[str, Tensor]:
    """Which elements of a model's parameters are visible: transformers loads masks in the same way as weights.

    Args:
        model: the result of `build_model` for `dense`.
        config: the proxy's config.json.
        dense: the proxy's tensors under their own names.
        visible: visible units of masked tensors.
        where: the proxy, for error messages.

    Returns:
        For each parameter with hidden units a bool mask in its shape, True where visible.

    Raises:
        InputError: transformers mixes or ties tensors, so that a parameter is not made of whole elements of them.
    """
    one = torch.ones((), dtype=torch.bfloat16)
    state: dict[str, Tensor] = {}
    for name, tensor in dense.items():
        if name in visible and not visible[name].flags.all():
            state[name] = expanded(visible[name], tuple(tensor.shape)).to(torch.bfloat16)
        else:
            state[name] = one.expand(tensor.shape) if tensor.is_floating_point() else tensor
    parameters = dict(build_model(config, state, where=where, dtype=torch.bfloat16).named_parameters())
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
    """Check that `stored_tensors` returns every tensor that a model was built from, bit for bit.

    Raises:
        InputError: it does not, so an update could not be expressed in the proxy's tensors.
    """
    back = stored_tensors(model, dense)
    for name, tensor in dense.items():
        if name not in back and name not in visible:
            continue  # a buffer of older checkpoints that the architecture does not use
        if name not in back or back[name].shape != tensor.shape or not torch.equal(back[name].to(tensor.dtype), tensor):
            raise InputError(
                f"transformers changes {name} when it loads the proxy, so it cannot be trained", where=where
            )
