"""From a checkpoint to a model that computes, and back to tensors under the checkpoint's own names.

    checkpoint ──load_dense──▶ dense tensors ──transformers──▶ model ──stored_tensors──▶ dense tensors

transformers renames, fuses and ties tensors on the way (experts of Mixtral become one parameter). Nothing here repeats
those rules: masks go the same way as weights, and what comes back is checked against what went in.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedqsn_cli.checkpoint import Checkpoint
from fedqsn_cli.errors import InputError
from fedqsn_cli.models.architecture import Task, task_of
from fedqsn_cli.models.dense import load_dense as load_dense
from fedqsn_cli.models.messages import first_line, quiet
from fedqsn_cli.models.tokenizer import load_tokenizer
from fedqsn_cli.planning.roles import rules
from fedqsn_cli.planning.tied import model_type

# Fields of config.json that would make transformers load code or kernels from elsewhere, or packed weights.
_REFUSED_FIELDS = (
    "auto_map",
    "quantization_config",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
    "kernel_config",
    "fusion_config",
    "use_kernels",
    "custom_pipelines",
)

_UNLIMITED = 1 << 30  # positions


class Loaded(NamedTuple):
    """A model that computes, its tokenizer (None: the checkpoint has none), and what it is for."""

    model: Any
    tokenizer: Any
    task: Task

    @property
    def inputs(self) -> frozenset[str]:
        """Names of inputs that the model's forward takes."""
        return frozenset(inspect.signature(self.model.forward).parameters)

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the model knows."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def pad_id(self) -> int:
        """The id that pads batches, of tokenizer and model alike: a decoder's classifier finds a text's end by it.

        The tokenizer's, the model's, or the end of text; if there is none of them, one that no text has, or 0.
        """
        config, tokenizer = self.model.config.get_text_config(), self.tokenizer
        known = [getattr(one, "pad_token_id", None) for one in (tokenizer, config)]
        known += [getattr(tokenizer, "eos_token_id", None), len(tokenizer) if tokenizer is not None else None]
        return next((one for one in known if type(one) is int and 0 <= one < self.vocabulary), 0)

    @property
    def positions(self) -> int:
        """Longest input in tokens."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if type(positions) is not int or positions <= 0:
            return _UNLIMITED
        for name, module in self.model.named_modules():  # RoBERTa counts positions from behind the padding id
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                return max(1, positions - int(module.padding_idx) - 1)
        return positions


def load_model(checkpoint: Checkpoint, *, dense: Mapping[str, Tensor] | None = None) -> Loaded:
    """Build the model of a checkpoint on the CPU, in evaluation mode, with dense weights in fp32.

    Args:
        checkpoint: a global model, server model (its scale is applied), quantized model or proxy.
        dense: its tensors, where they have been read already; parameters may share memory with them.

    Raises:
        InputError: transformers cannot build it, or its tensors are not exactly those of the architecture.
    """
    task, _ = task_of(checkpoint.config, checkpoint.path)
    state = load_dense(checkpoint) if dense is None else dense
    model = build_model(checkpoint.config or {}, state, where=checkpoint.path)
    return with_tokenizer(model, checkpoint, task)


def load_outline(checkpoint: Checkpoint) -> Loaded:
    """The model of a checkpoint without its weights, and its tokenizer: enough to encode data. Raises InputError."""
    task, architecture = task_of(checkpoint.config, checkpoint.path)
    with quiet():
        kind = _model_class(architecture, checkpoint.path)
        try:
            with torch.device("meta"):
                model = kind(_clean_config(checkpoint.config or {}, kind))
        except Exception as error:  # a config may ask for anything
            raise _cannot_build(error, checkpoint.path) from None
    return with_tokenizer(model, checkpoint, task)


def with_tokenizer(model: Any, checkpoint: Checkpoint, task: Task) -> Loaded:
    """A model with the tokenizer of its checkpoint, and with one padding id for both."""
    loaded = Loaded(model, load_tokenizer(checkpoint), task)
    for config in {id(one): one for one in (model.config, model.config.get_text_config())}.values():
        config.pad_token_id = loaded.pad_id
    embedding = model.get_input_embeddings()
    if getattr(embedding, "padding_idx", None) is not None:  # its row would get no gradient, padding or not
        embedding.padding_idx = loaded.pad_id
    return loaded


def _cannot_build(error: Exception, where: object) -> InputError:
    return InputError(f"transformers cannot build the model ({first_line(error)})", where=where)


def build_model(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    *,
    where: object,
    dtype: torch.dtype = torch.float32,
    quantization: Mapping[str, Any] | None = None,
) -> Any:
    """Let transformers put tensors, named as in the checkpoint, into a model.

    Parameters may share memory with `state`. Raises InputError, also when a tensor is missing or too many: no part of
    the model is ever left at random values.

    Args:
        quantization: how bitsandbytes packed some of the tensors; they stay packed. The one in `config` never counts.
    """
    _, architecture = task_of(config, where)
    with quiet():
        kind = _model_class(architecture, where)
        packed: dict[str, Any] = {}
        try:
            clean = _clean_config(config, kind)
            if quantization is not None:
                clean.quantization_config = dict(quantization)
                packed["device_map"] = {"": "cpu"}  # else transformers chooses a GPU
            model, report = kind.from_pretrained(
                None,
                config=clean,
                state_dict=dict(state),
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report, and refused below
                **packed,
            )
        except Exception as error:  # a config may ask for anything
            raise _cannot_build(error, where) from None
    _check_report(report, state, model_type(config), where)
    return model


def _model_class(architecture: str, where: object) -> Any:
    """The class of transformers itself that has this name. Raises InputError."""
    import transformers

    kind = getattr(transformers, architecture, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        hint = "code that comes with a model is never run"
        raise InputError(f"transformers has no architecture {architecture}", where=where, hint=hint)
    return kind


def _clean_config(config: Mapping[str, Any], kind: Any) -> Any:
    """transformers' config object, without fields that fetch or run something."""
    return kind.config_class.from_dict(_without_refused(dict(config)))


def _without_refused(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_refused(item) for key, item in value.items() if key not in _REFUSED_FIELDS}
    return value


def _check_report(
    report: Mapping[str, Any], state: Mapping[str, Tensor], model_type: str | None, where: object
) -> None:
    """Refuse a model whose tensors are not those of the checkpoint. Raises InputError."""
    weights = {name for name, tensor in state.items() if not _is_buffer(name, tensor, model_type)}
    for key, text in (("missing_keys", "lacks"), ("mismatched_keys", "has another shape for")):
        names = sorted(str(item[0] if isinstance(item, tuple) else item) for item in report.get(key) or ())
        if names:
            raise InputError(f"the checkpoint {text} {_some(names)}", where=where, hint="save the model with its head")
    extra = sorted(name for name in report.get("unexpected_keys") or () if name in weights or name not in state)
    if extra:
        raise InputError(f"the architecture has no {_some(extra)}", where=where, hint="check config.json")
    if report.get("error_msgs"):
        raise InputError(f"the tensors do not fit ({report['error_msgs'][0]})", where=where)


def _is_buffer(name: str, tensor: Tensor, model_type: str | None) -> bool:
    """Is it no weight, but a constant that older checkpoints store beside them? The owner's plan says the same."""
    role = rules().role(name, tensor.dim(), model_type)
    return not tensor.is_floating_point() or (role is not None and role.name == "buffer")


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def stored_tensors(model: Any, names: Iterable[str]) -> dict[str, Tensor]:
    """A model's tensors under the names and in the shapes of its checkpoint.

    Args:
        model: built by `build_model`.
        names: the checkpoint's names; those that are not tensors of the model (old buffers) do not come back.
    """
    return checkpoint_tensors(model, model.state_dict(), names)


def checkpoint_tensors(model: Any, state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors by a model's own names, taken the way back to the names and shapes of its checkpoint.

    Args:
        model, names: as for `stored_tensors`.
        state: tensors in the shapes of the model's parameters.
    """
    from transformers.core_model_loading import revert_weight_conversion

    with torch.no_grad(), quiet():
        tensors = revert_weight_conversion(model, dict(state))
    return _by_name(tensors, names, model)


def _by_name(tensors: Mapping[str, Tensor], names: Iterable[str], model: Any) -> dict[str, Tensor]:
    """The tensors that a checkpoint has, by its own names: with or without the prefix of the base model."""
    prefix = f"{model.base_model_prefix}."
    found = {}
    for name in names:
        for spelling in (name, prefix + name, name.removeprefix(prefix)):
            if spelling in tensors:
                found[name] = tensors[spelling]
                break
    return found


def tensor_names(model: Any, parameters: Mapping[str, tuple[int, ...]], names: Iterable[str]) -> dict[str, str]:
    """The checkpoint's name of each parameter that is exactly one of its tensors; the others are left out.

    Args:
        model: built by `build_model`, its weights packed or not.
        parameters: shapes by the model's names, before packing.
        names: the checkpoint's names.
    """
    from transformers.core_model_loading import revert_weight_conversion

    bare = copy.copy(model)  # a model without memory of how weights were packed, which is never reverted
    conversions = [step for step in getattr(model, "_weight_conversions", None) or () if not _packs(step)]
    bare._weight_conversions = conversions or None
    empty = {name: torch.empty(shape, device="meta") for name, shape in parameters.items()}
    with torch.no_grad(), quiet():
        tensors = revert_weight_conversion(bare, empty) if conversions else empty
    whose = {id(tensor): name for name, tensor in empty.items()}
    found = _by_name(tensors, names, model)
    return {whose[id(tensor)]: name for name, tensor in found.items() if id(tensor) in whose}


def _packs(conversion: Any) -> bool:
    """Whether a step of transformers' loading is the one that makes bitsandbytes' packed weights."""
    return any("bitsandbytes" in type(step).__module__ for step in getattr(conversion, "operations", ()))


def choose_device(name: str) -> torch.device:
    """The device that an option names: auto, cpu, cuda or cuda:N. Raises InputError when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()) or (kind == "cpu" and number):
        raise InputError(f"unknown device {name!r}", where="--device", hint="use auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise InputError(f"there is no device {name}", where="--device", hint="use --device cpu")
    return torch.device(name)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn an accelerator's lack of memory into Python's own; the command line says what helps for each command."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise MemoryError("the device has too little memory") from None
