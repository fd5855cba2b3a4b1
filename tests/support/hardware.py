"""What bitsandbytes makes of packed weights on this machine's processor, told apart from what the bytes say.

The weights are the same everywhere and are compared exactly. Their product with an input is not: with AVX512_BF16
bitsandbytes multiplies 4-bit weights in bfloat16, whatever dtype it is asked for. How far that is off is measured here.
And the table of double quantization, which bitsandbytes makes anew in every process, depends on torch.linspace.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from bitsandbytes import functional, nn
from torch import Tensor

from fedqsn_cli.quantization.codebooks import dynamic_map


def unpacked_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The name of each packed layer, and its weight `[out, in]` as bitsandbytes unpacks it.

    For models that have computed nothing yet: with AVX512_BF16 the first product puts other scales in place of those of
    the file. Weights are unpacked as one row: by rows, the AVX-512 code of bitsandbytes 0.50 takes the scales of other
    blocks where blocks do not end with rows.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear4bit):
            state = copy.copy(module.weight.quant_state)
            shape, state.shape = state.shape, torch.Size((1, state.shape.numel()))
            yield name, functional.dequantize_4bit(module.weight.data, state).reshape(shape)
        elif isinstance(module, nn.Linear8bitLt):
            yield name, functional.int8_vectorwise_dequant(module.weight.CB, module.weight.SCB)


def unpack(model: Any) -> Any:
    """The same model with ordinary layers of those weights in place of packed ones."""
    for name, weight in list(unpacked_weights(model)):
        packed = model.get_submodule(name)
        plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=packed.bias is not None)
        plain.weight = torch.nn.Parameter(weight.float())
        plain.bias = packed.bias if packed.bias is None else torch.nn.Parameter(packed.bias.float())
        model.set_submodule(name, plain.eval())
    return model


@cache
def layer_error() -> float:
    """How far this machine's 4-bit layers are off, as a share of their outputs: 1e-7, or 3e-3 with AVX512_BF16."""
    chance = torch.Generator().manual_seed(0)
    dense, x = torch.randn(128, 128, generator=chance), torch.randn(256, 128, generator=chance)
    layer = nn.Linear4bit(128, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = nn.Params4bit(dense, requires_grad=False, quant_type="nf4").to("cpu")
    weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    with torch.no_grad():
        off = layer.eval()(x).double() - x.double() @ weight.double().T
    return float(off.norm() / (x.double() @ weight.double().T).norm())


def assert_close(found: Tensor, expected: Tensor, *, layers: int) -> None:
    """Logits through so many packed layers are equal but for rounding, and but for what this machine makes of layers.

    Errors of layers add up at most. Without AVX512_BF16 they are far below the usual tolerance, which is then the one.
    """
    slack = layer_error() * layers * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=max(1e-5, slack))


def linspace_is_fused() -> bool:
    """Does torch.linspace round once, as with AVX2 or AVX-512? Without, it rounds products and sums."""
    begin, end = np.float64(np.float32(0.1)), np.float64(1)
    step = np.float64(np.float32(end - begin) / np.float32(8))
    once = [begin + step * i if i < 4 else end - step * (8 - i) for i in range(9)]
    return bool(torch.equal(torch.linspace(0.1, 1, 9), torch.tensor(once, dtype=torch.float32)))


@contextmanager
def fused_dynamic_map() -> Iterator[None]:
    """Let bitsandbytes quantize scales by the table of our files, whatever torch.linspace gives on this machine."""
    before = functional.name2qmap.get("dynamic")
    functional.name2qmap["dynamic"] = torch.from_numpy(dynamic_map().copy())
    try:
        yield
    finally:
        del functional.name2qmap["dynamic"]
        if before is not None:
            functional.name2qmap["dynamic"] = before
