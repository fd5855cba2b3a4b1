"""Which units a proxy shows, and which elements of a model's parameters they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedqsn_cli.artifacts.manifests import ProxyManifest
from fedqsn_cli.artifacts.proxy_folder import open_visible
from fedqsn_cli.errors import InputError
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.models.torch_model import checkpoint_tensors, stored_tensors, tensor_names


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
    model: Any, dense: Mapping[str, Tensor], visible: Mapping[str, UnitMask], where: object
) -> dict[str, Tensor]:
    """Which elements of a model's parameters are visible.

    Args:
        model: the result of `build_model` for `dense`.
        dense: the proxy's tensors under their own names; only their shapes are looked at.
        visible: visible units of masked tensors.
        where: the proxy, for error messages.

    Returns:
        For each parameter with hidden units a bool mask in its shape, True where visible.

    Raises:
        InputError: transformers mixes or ties tensors, so that a parameter is not made of whole elements of them.
    """
    _refuse_untied(model, where)
    hidden = {name: mask for name, mask in visible.items() if not mask.flags.all()}
    parameters = {name: tuple(value.shape) for name, value in model.named_parameters(remove_duplicate=False)}
    whole = tensor_names(model, parameters, dense)
    masks = {name: expanded(hidden[tensor], parameters[name]) for name, tensor in whole.items() if tensor in hidden}
    known = {id(model.get_parameter(name)) for name in whole}  # a tied weight may be stored once
    made_of_several = {name: shape for name, shape in parameters.items() if id(model.get_parameter(name)) not in known}
    masks |= _assembled(model, made_of_several, dense, hidden, where)
    found: dict[int, str] = {}
    for name, mask in list(masks.items()):
        first = found.setdefault(id(model.get_parameter(name)), name)
        if not torch.equal(masks[first], mask):
            raise InputError(f"{name} and {first} are one tensor with two masks, so it cannot be trained", where=where)
    return {name: masks[name] for name in found.values()}


def _refuse_untied(model: Any, where: object) -> None:
    """Refuse a model in which tensors that its config ties differ: transformers leaves them apart. Raises InputError.

    The owner hides the same units of both and adds up what clients send for them, which would be wrong for two weights.
    """
    for name, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if model.get_parameter(name) is not model.get_parameter(source):
            raise InputError(f"{name} is tied to a tensor that differs from it, so it cannot be trained", where=where)


def _assembled(
    model: Any,
    parameters: Mapping[str, tuple[int, ...]],
    names: Iterable[str],
    hidden: Mapping[str, UnitMask],
    where: object,
) -> dict[str, Tensor]:
    """The masks of parameters that transformers makes of several tensors, or of a turned one (the experts of a layer).

    The numbers of their elements, taken the way back to the checkpoint, say which element came from where.
    """
    elements = {name: math.prod(shape) for name, shape in parameters.items()}
    numbers = torch.split(torch.arange(sum(elements.values())), list(elements.values()))
    state = {name: part.view(parameters[name]) for name, part in zip(elements, numbers, strict=True)}
    seen = torch.zeros(sum(elements.values()), dtype=torch.uint8)
    shown = torch.ones(len(seen), dtype=torch.bool)
    for name, origin in checkpoint_tensors(model, state, names).items():
        if name in hidden:
            shown[origin.reshape(-1)] = expanded(hidden[name], tuple(origin.shape)).reshape(-1)
        seen[origin.reshape(-1)] += 1
    if not bool((seen == 1).all()):
        raise InputError("transformers mixes the tensors of the proxy, so they cannot be trained", where=where)
    parts = torch.split(shown, list(elements.values()))
    return {name: part.view(parameters[name]) for name, part in zip(elements, parts, strict=True) if not part.all()}


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
