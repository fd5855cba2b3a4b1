"""Names, shapes and texts of packed tensors, exactly as transformers and bitsandbytes write them.

    <module>.weight                                  U8 [ceil(n / 2), 1]    two codes a byte
    <module>.weight.absmax                           F32 [ceil(n / block)], or U8 when the scales are quantized
    <module>.weight.quant_map                        F32 [16]
    <module>.weight.nested_absmax                    F32 [ceil(blocks / 256)]    quantized scales only
    <module>.weight.nested_quant_map                 F32 [256]                   quantized scales only
    <module>.weight.quant_state.bitsandbytes__nf4    U8 [text], JSON (or __fp4)

    <module>.weight    I8 [out, in]        <module>.SCB    F32 [out]        <module>.weight_format    U8 [], always 0

The JSON of quantized scales ends in spaces: a fixed length can be planned before the offset is known.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.checkpoint.header import TensorSpec
from fedqsn_cli.dtypes import DTYPES
from fedqsn_cli.quantization.codebooks import FORMATS
from fedqsn_cli.quantization.nested_scales import NESTED_BLOCK
from fedqsn_cli.quantization.scales import Scales

Array = NDArray[Any]

LONGEST_FLOAT = 24  # characters of Python's longest repr of a finite float


@dataclass(frozen=True, slots=True)
class Packing:
    """How one tensor of a checkpoint is packed.

    Args:
        kind: pack4 or pack8.
        format: nf4, fp4 or int8.
        dtype, shape: what it holds when it is unpacked (F32, F16 or BF16; [out, in]).
        block: values a scale; 0 for int8.
        double: are the scales quantized themselves?
        companions: names of the tensors that belong to it.
    """

    kind: Literal["pack4", "pack8"]
    format: str
    dtype: str
    shape: tuple[int, ...]
    block: int
    double: bool
    companions: tuple[str, ...]


def companion_specs(
    name: str, shape: Sequence[int], dtype: str, format: str, block: int, double: bool
) -> list[TensorSpec]:
    """All stored tensors that one packed weight becomes, its codes first and its JSON last.

    Args:
        name: `<module>.weight`.
        shape: [out, in].
        dtype: what it holds when it is unpacked: F32, F16 or BF16.
        format, block, double: nf4, fp4 or int8; values a scale; are the scales quantized too?
    """
    shape = tuple(shape)
    if format == "int8":
        return [
            TensorSpec(name, "I8", shape),
            TensorSpec(scb_name(name), "F32", shape[:1]),
            TensorSpec(weight_format_name(name), "U8", ()),
        ]
    count = math.prod(shape)
    blocks = -(-count // block)
    specs = [
        TensorSpec(name, "U8", (-(-count // 2), 1)),
        TensorSpec(f"{name}.absmax", "U8" if double else "F32", (blocks,)),
        TensorSpec(f"{name}.quant_map", "F32", (16,)),
    ]
    if double:
        specs.append(TensorSpec(f"{name}.nested_absmax", "F32", (-(-blocks // NESTED_BLOCK),)))
        specs.append(TensorSpec(f"{name}.nested_quant_map", "F32", (256,)))
    text = _state_text(shape, dtype, format, block, 0.0 if double else None)
    return [*specs, TensorSpec(state_name(name, format), "U8", (len(text),))]


def companion_arrays(name: str, shape: Sequence[int], dtype: str, scales: Scales) -> dict[str, Array]:
    """What `companion_specs` planned, except for the codes, by name."""
    if scales.format == "int8":
        return {scb_name(name): scales.absmax, weight_format_name(name): np.zeros((), np.uint8)}
    nested = scales.nested
    arrays: dict[str, Array] = {
        f"{name}.absmax": scales.absmax if nested is None else nested.codes,
        f"{name}.quant_map": np.array(FORMATS[scales.format].values, np.float32),
    }
    if nested is not None:
        arrays[f"{name}.nested_absmax"] = nested.nested_absmax
        arrays[f"{name}.nested_quant_map"] = nested.nested_map
    offset = None if nested is None else float(nested.offset)
    text = _state_text(tuple(shape), dtype, scales.format, scales.block, offset)
    arrays[state_name(name, scales.format)] = np.frombuffer(text, np.uint8)
    return arrays


def _state_text(shape: tuple[int, ...], dtype: str, format: str, block: int, offset: float | None) -> bytes:
    """The JSON of a packed tensor; with quantized scales, spaces make it as long as its longest offset would."""
    state: dict[str, Any] = {
        "quant_type": format,
        "blocksize": block,
        "dtype": DTYPES[dtype].torch,
        "shape": list(shape),
    }
    if offset is None:
        return json.dumps(state).encode()
    state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    text = json.dumps(state)
    return text.ljust(len(text) - len(repr(offset)) + LONGEST_FLOAT).encode()


def state_name(name: str, format: str) -> str:
    """Name of the JSON of `<module>.weight`."""
    return f"{name}.quant_state.bitsandbytes__{format}"


def scb_name(name: str) -> str:
    """Name of the row scales of an int8 `<module>.weight`."""
    return f"{name.removesuffix('weight')}SCB"


def weight_format_name(name: str) -> str:
    """Name of the layout flag of an int8 `<module>.weight`."""
    return f"{name}_format"


def quantization_config(
    format: str, block: int, double: bool, skip_modules: Sequence[str], dtype: str
) -> dict[str, Any]:
    """`quantization_config` of config.json, as transformers' BitsAndBytesConfig writes it.

    Args:
        format, double: nf4, fp4 or int8; are the scales quantized too?
        block: not part of it; every packed tensor tells its own.
        skip_modules: every module that stays as it is, since a list given replaces transformers' own.
        dtype: what 4-bit layers compute in: F32, F16 or BF16.
    """
    four = format != "int8"
    return {
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_compute_dtype": DTYPES[dtype].torch if four else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": format if four else "fp4",
        "bnb_4bit_use_double_quant": four and double,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(skip_modules),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "quant_method": "bitsandbytes",
    }
