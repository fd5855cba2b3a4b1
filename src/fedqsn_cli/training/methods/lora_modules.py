"""Which modules of a proxy get adapters, which are trained in full beside them, and which tensors they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedqsn_cli.dtypes import FROM_TORCH
from fedqsn_cli.errors import InputError
from fedqsn_cli.models.torch_model import tensor_names
from fedqsn_cli.options.lora import ALL_LINEAR, LoraOptions
from fedqsn_cli.planning.plan import make_plan

_TARGETS, _SAVED = "--target-modules", "--modules-to-save"
_ADAPTED_ROLES = ("linear", "conv1d")  # of what all-linear means


@dataclass(frozen=True, slots=True)
class TargetModule:
    """A linear layer that gets an adapter.

    Args:
        name: of the module. tensor: its weight in the proxy.
        transposed: the tensor is stored as [in, out].
    """

    name: str
    tensor: str
    transposed: bool


@dataclass(frozen=True, slots=True)
class ChosenModules:
    """What is trained of a proxy.

    Args:
        targets: layers that get adapters.
        saved: modules that are trained in full. parameters: the proxy's name of each of their parameters.
    """

    targets: tuple[TargetModule, ...]
    saved: tuple[str, ...]
    parameters: Mapping[str, str]


def choose_modules(
    model: Any, layout: Mapping[str, Tensor], config: Mapping[str, Any] | None, options: LoraOptions
) -> ChosenModules:
    """Find the modules that options name, or those that are usual.

    Args:
        model: of a proxy, packed or not. layout: the proxy's tensors before packing. config: its config.json.

    Raises:
        InputError: a name fits nothing, or something that cannot be trained so that an update can express it.
    """
    finder = _Finder(model, layout, config)
    saved = finder.saved(options.modules_to_save)
    targets = finder.targets(options.target_modules or (ALL_LINEAR,), saved)
    return ChosenModules(targets, saved, finder.parameters_of(saved))


class _Finder:
    """The modules of a model, and the tensors of its proxy."""

    def __init__(self, model: Any, layout: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> None:
        self._model = model
        self._layout = layout
        self._modules: dict[str, nn.Module] = dict(model.named_modules())
        self._tied = _tied_parameters(model)
        linear = {f"{name}.weight": _shape(module) for name, module in self._modules.items() if _is_linear(module)}
        self._weights = tensor_names(model, linear, layout)
        shapes = {n: (FROM_TORCH[str(t.dtype).removeprefix("torch.")], tuple(t.shape)) for n, t in layout.items()}
        self._roles = {tensor.name: tensor.role for tensor in make_plan(shapes, config).tensors}
        self._expert_names = _expert_names(model, linear)

    def saved(self, names: Iterable[str]) -> tuple[str, ...]:
        """Modules to train in full: those of the given names, else a classifier's head."""
        if names:
            return tuple(dict.fromkeys(found for name in names for found in self._fitting(name, _SAVED)))
        if not type(self._model).__name__.endswith("Classification"):
            return ()
        heads = [name for name, _ in self._model.named_children() if name != self._model.base_model_prefix]
        return tuple(part for head in heads for part in self._unpacked_parts(head))

    def _unpacked_parts(self, module: str) -> Iterator[str]:
        """The module, or where a weight in it is packed, those parts of it in which none is."""
        if not self._has_packed(module):
            if _has_parameters(self._modules[module]):
                yield module
            return
        for name, _ in self._modules[module].named_children():
            yield from self._unpacked_parts(f"{module}.{name}")

    def targets(self, names: Iterable[str], saved: tuple[str, ...]) -> tuple[TargetModule, ...]:
        """Linear layers to adapt, in the order of the model."""
        chosen: set[str] = set()
        for name in names:
            chosen.update(self._all_linear(saved) if name == ALL_LINEAR else self._fitting(name, _TARGETS))
        inside = [name for name in chosen if _is_inside(name, saved)]
        if inside:
            raise InputError(f"{inside[0]} is trained in full already", where=_TARGETS, hint=f"see {_SAVED}")
        found = tuple(self._target(name) for name in self._modules if name in chosen)
        if not found:
            raise InputError("the model has no linear layer to adapt", where=_TARGETS, hint="use --method full")
        return found

    def parameters_of(self, saved: tuple[str, ...]) -> dict[str, str]:
        """The proxy's name of each parameter of some modules, by the model's name."""
        shapes = {}
        for module in saved:
            others = [name for name in self._modules if name.endswith(module) and not _is_inside(name, saved)]
            if others:  # peft compares only the ends of names
                what = f"peft cannot train {module} in full without {others[0]}"
                raise InputError(what, where=_SAVED, hint="ask for a proxy of --layout dense, or use --method full")
            if self._has_packed(module):
                what = f"{module} is packed, so it cannot be trained in full"
                raise InputError(what, where=_SAVED, hint=f"give it an adapter: {_TARGETS}")
            for name, parameter in self._modules[module].named_parameters(prefix=module):
                self._refuse_tied(name, _SAVED)
                shapes[name] = tuple(parameter.shape)
        known = tensor_names(self._model, shapes, self._layout)
        for name in shapes:
            if name not in known:
                what = f"{name} is not one tensor of the proxy, so it cannot be trained"
                raise InputError(what, where=_SAVED, hint="use --method full")
        return known

    def _fitting(self, name: str, flag: str) -> list[str]:
        """Modules with parameters of this name, or whose name ends with it, as peft understands names."""
        found = [
            module
            for module, content in self._modules.items()
            if (module == name or module.endswith(f".{name}")) and _has_parameters(content)
        ]
        if not found:
            raise InputError(f"no module is called {name}", where=flag, hint="names are those of the model's modules")
        return found

    def _all_linear(self, saved: tuple[str, ...]) -> Iterator[str]:
        """Every linear layer but heads, routers, and those that peft takes for experts."""
        for name, tensor in self._weights.items():
            module = name.removesuffix(".weight")
            usual = self._roles[tensor] in _ADAPTED_ROLES and _last(module) not in self._expert_names
            if usual and not _is_inside(module, saved) and name not in self._tied:
                yield module

    def _target(self, name: str) -> TargetModule:
        """A linear layer, checked."""
        module, weight = self._modules[name], f"{name}.weight"
        if not _is_linear(module):
            what = f"{name} is not a linear layer but {type(module).__name__}"
            raise InputError(what, where=_TARGETS, hint=f"train it in full: {_SAVED}")
        self._refuse_tied(weight, _TARGETS)
        if _last(name) in self._expert_names:
            what = f"peft takes {name} for one of the experts, which this model holds in one tensor"
            raise InputError(what, where=_TARGETS, hint="name other layers, or use --method full")
        tensor = self._weights.get(weight)
        if tensor is None or tuple(self._layout[tensor].shape) != _shape(module):
            what = f"the weight of {name} is not one tensor of the proxy, so no adapter of it can be merged"
            raise InputError(what, where=_TARGETS, hint="name other layers")
        return TargetModule(name, tensor, _is_transposed(module))

    def _refuse_tied(self, parameter: str, flag: str) -> None:
        if parameter in self._tied:
            what = f"{parameter} is tied to another weight, so it cannot be trained alone"
            raise InputError(what, where=flag, hint="use --method full")

    def _has_packed(self, module: str) -> bool:
        return not all(parameter.is_floating_point() for parameter in self._modules[module].parameters())


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_inside(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer, of torch, of GPT-2, or packed by bitsandbytes."""
    return isinstance(module, nn.Linear | Conv1D)


def _is_transposed(module: nn.Module) -> bool:
    """Whether the checkpoint has its weight as [in, out]."""
    return isinstance(module, Conv1D) or getattr(module, "source_cls", None) is Conv1D


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _expert_names(model: Any, weights: Iterable[str]) -> frozenset[str]:
    """Last components of names by which peft, here and where an update is opened, would adapt stacked experts instead.

    transformers stacks the experts of some families; peft turns the names that they had before into the stacks, and
    other layers of such a model may have the same names.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    found = set()
    for name in {_last(weight.removesuffix(".weight")) for weight in weights}:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # half of what is fused into one stack
            found.add(name)
        else:
            found |= {name}.difference(config.target_modules or ())
    return frozenset(found)


def _shape(module: Any) -> tuple[int, ...]:
    """Shape of a linear layer's weight in the checkpoint, before packing."""
    if isinstance(module, Conv1D):
        return tuple(module.weight.shape)
    shape = (int(module.out_features), int(module.in_features))
    return shape[::-1] if _is_transposed(module) else shape


def _tied_parameters(model: Any) -> frozenset[str]:
    """Names of parameters that several modules share."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return frozenset(name for shared in names.values() if len(shared) > 1 for name in shared)
