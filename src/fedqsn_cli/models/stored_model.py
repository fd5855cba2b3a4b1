"""The transformers model of a proxy as it is stored: packed weights stay packed, dense ones keep their dtype.

There is one copy of the weights, the file's: it is mapped, so that of an embedding only the rows in use are read. No
weight is unpacked.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedqsn_cli.artifacts.manifests import Quantization
from fedqsn_cli.checkpoint import Checkpoint
from fedqsn_cli.dtypes import DTYPES
from fedqsn_cli.errors import FormatError
from fedqsn_cli.models.architecture import task_of
from fedqsn_cli.models.dense import DenseTensors, from_bytes
from fedqsn_cli.models.torch_model import Loaded, build_model, with_tokenizer
from fedqsn_cli.quantization.bnb_format import quantization_config


def load_stored(checkpoint: Checkpoint, kind: Quantization | None, compute: torch.dtype) -> Loaded:
    """Build the model of a proxy or a quantized model on the CPU, in evaluation mode; nothing of it can be trained.

    Args:
        checkpoint: the proxy. kind: how it is quantized, by its manifest.
        compute: what packed layers compute in.

    Raises:
        InputError: transformers cannot build it, or its tensors are not exactly those of the architecture.
        FormatError: config.json contradicts the manifest.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    task, _ = task_of(checkpoint.config, checkpoint.path)
    state = {name: _stored(checkpoint, name) for name in checkpoint.entries}
    model = build_model(
        checkpoint.config or {},
        state,
        where=checkpoint.path,
        dtype=_usual_dtype(DenseTensors(checkpoint).layout),
        quantization=_quantization(checkpoint, kind, compute),
    )
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if type(module).__module__.startswith("bitsandbytes."):
            _prepare_packed(name, module, checkpoint)
    return with_tokenizer(model, checkpoint, task)


def _stored(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor as it is in the file."""
    entry = checkpoint.entries[name]
    return from_bytes(checkpoint.mapped(name), entry.dtype, entry.shape)


def _prepare_packed(name: str, module: Any, checkpoint: Checkpoint) -> None:
    """Let a module of bitsandbytes be trained like any other. Raises FormatError: its weight is not packed."""
    if module.weight.is_floating_point():
        what = f"{name} is not packed, and config.json does not list it in llm_int8_skip_modules"
        raise FormatError(what, where=checkpoint.path)
    if hasattr(module, "support_avx512bf16_for_cpu"):
        # Else, at the first evaluation, bitsandbytes packs the weight anew for CPUs with AVX512_BF16. It is then
        # multiplied in bfloat16, and by a kernel without a gradient: training would stop learning.
        module.support_avx512bf16_for_cpu = False
    module.register_forward_hook(_in_autocast)


def _in_autocast(_: Any, __: Any, output: Tensor) -> Tensor:
    """The dtype that autocast gives the outputs of any other linear layer: models rely on it (DeBERTa's masks)."""
    kind = output.device.type
    return output.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else output


def _usual_dtype(layout: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype that most numbers of the model have."""
    numbers: Counter[torch.dtype] = Counter()
    for tensor in layout.values():
        if tensor.is_floating_point():
            numbers[tensor.dtype] += tensor.numel()
    return numbers.most_common(1)[0][0] if numbers else torch.float32


def _quantization(checkpoint: Checkpoint, kind: Quantization | None, compute: torch.dtype) -> dict[str, Any] | None:
    """How bitsandbytes packed the weights; of config.json only the list of modules that it left out is believed."""
    if kind is None or kind.layout != "bnb":
        return None
    told = (checkpoint.config or {}).get("quantization_config")
    skip = told.get("llm_int8_skip_modules") if isinstance(told, dict) else None
    if not isinstance(skip, list) or not all(isinstance(name, str) for name in skip):
        raise FormatError("config.json does not list the modules that are not packed", where=checkpoint.path)
    name = next(dtype.name for dtype in DTYPES.values() if dtype.torch and getattr(torch, dtype.torch) is compute)
    return quantization_config(kind.format, kind.block_size, kind.double_quant, skip, name)
