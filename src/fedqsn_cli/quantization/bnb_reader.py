"""Packed tensors of a checkpoint, read strictly: whatever bitsandbytes would not have written is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli import strictjson
from fedqsn_cli.checkpoint.header import TensorEntry, TensorSpec
from fedqsn_cli.checkpoint.reader import Checkpoint
from fedqsn_cli.dtypes import FROM_TORCH
from fedqsn_cli.errors import FormatError
from fedqsn_cli.quantization.bnb_format import (
    Packing,
    companion_specs,
    scb_name,
    state_name,
    weight_format_name,
)
from fedqsn_cli.quantization.codebooks import BLOCK_SIZES, FORMATS
from fedqsn_cli.quantization.nested_scales import NESTED_BLOCK, DoubleQuantized, double_dequantize
from fedqsn_cli.quantization.scales import Scales

Array = NDArray[Any]

_FIELDS = {"quant_type": str, "blocksize": int, "dtype": str, "shape": list}
_NESTED_FIELDS = {"nested_blocksize": int, "nested_dtype": str, "nested_offset": float}
_LONGEST_STATE = 1024


def find_packings(checkpoint: Checkpoint) -> dict[str, Packing]:
    """All packed tensors of a checkpoint, by name. int8 tensors get the dtype that config.json names.

    Raises:
        FormatError: a packed tensor is incomplete, or one of its parts is not what bitsandbytes writes.
    """
    entries = checkpoint.entries
    found = {}
    for name in entries:
        for format in ("nf4", "fp4"):
            if name.endswith(suffix := state_name("", format)):
                weight = name.removesuffix(suffix)
                found[weight] = _packing4(checkpoint, weight, format)
        if name.endswith(".SCB") or name == "SCB":
            weight = f"{name.removesuffix('SCB')}weight"
            found[weight] = _packing8(checkpoint, weight)
    return found


def read_scales(checkpoint: Checkpoint, name: str) -> Scales:
    """The scales of one packed tensor.

    Raises:
        FormatError: a scale is negative, NaN or infinite, or a map is not the one of the format.
    """
    if scb_name(name) in checkpoint.entries:
        packing = _packing8(checkpoint, name)
    else:
        format = next(format for format in ("nf4", "fp4") if state_name(name, format) in checkpoint.entries)
        packing = _packing4(checkpoint, name, format)
    return parse_companions(name, packing, checkpoint.read, where=checkpoint.entries[name].file)


def parse_companions(name: str, packing: Packing, read: Callable[[str], Array], *, where: object) -> Scales:
    """The scales of one packed tensor, from its companions.

    Args:
        name: `<module>.weight`.
        packing: what its JSON says.
        read: gives the array of a companion.
        where: the file, for errors.

    Raises:
        FormatError: see `read_scales`.
    """
    if packing.kind == "pack8":
        if read(weight_format_name(name)) != 0:
            raise FormatError("int8 codes are not in row order", where=f"{where}: {weight_format_name(name)}")
        return Scales(packing.format, packing.block, _sound(read(scb_name(name)), f"{where}: {scb_name(name)}"))
    levels = np.array(FORMATS[packing.format].values, np.float32)
    if not np.array_equal(read(f"{name}.quant_map"), levels):
        raise FormatError(f"not the levels of {packing.format}", where=f"{where}: {name}.quant_map")
    stored = read(f"{name}.absmax")
    if not packing.double:
        return Scales(packing.format, packing.block, _sound(stored, f"{where}: {name}.absmax"))
    text = bytes(read(state_name(name, packing.format)))
    offset = np.float32(_state(text, packing.format, f"{where}: {name}")["nested_offset"])
    nested_absmax = _sound(read(f"{name}.nested_absmax"), f"{where}: {name}.nested_absmax")
    nested_map = read(f"{name}.nested_quant_map")
    if not (np.abs(nested_map) <= 1).all() or not (np.diff(nested_map) >= 0).all():
        raise FormatError("not an ascending map within [-1, 1]", where=f"{where}: {name}.nested_quant_map")
    nested = DoubleQuantized(stored, nested_absmax, nested_map, offset)
    absmax = double_dequantize(nested)
    if not np.isfinite(absmax).all():
        raise FormatError("a scale is NaN or infinite", where=f"{where}: {name}.absmax")
    return Scales(packing.format, packing.block, absmax, nested)


def _sound(scales: Array, where: str) -> NDArray[np.float32]:
    """Scales as they are, if they are finite and not negative."""
    if not (np.isfinite(scales) & (scales >= 0)).all():
        raise FormatError("a scale is negative, NaN or infinite", where=where)
    return scales


def _packing4(checkpoint: Checkpoint, name: str, format: str) -> Packing:
    entries, full_name = checkpoint.entries, state_name(name, format)
    where = f"{entries[full_name].file}: {full_name}"
    if not 0 < entries[full_name].nbytes <= _LONGEST_STATE:
        raise FormatError("not the JSON of a packed tensor", where=where)
    state = _state(bytes(checkpoint.read(full_name)), format, where)
    shape, dtype, block = tuple(state["shape"]), FROM_TORCH[state["dtype"]], state["blocksize"]
    double = "nested_offset" in state
    specs = companion_specs(name, shape, dtype, format, block, double)
    _check_shapes(entries, specs[:-1], where)
    return Packing("pack4", format, dtype, shape, block, double, tuple(spec.name for spec in specs[1:]))


def _packing8(checkpoint: Checkpoint, name: str) -> Packing:
    entries = checkpoint.entries
    where = f"{entries[scb_name(name)].file}: {scb_name(name)}"
    shape = entries[name].shape if name in entries else ()
    if len(shape) != 2:
        raise FormatError(f"{name} is not a matrix of int8 codes", where=where)
    named = (checkpoint.config or {}).get("dtype") or (checkpoint.config or {}).get("torch_dtype")
    dtype = FROM_TORCH.get(named, "F32") if isinstance(named, str) else "F32"
    specs = companion_specs(name, shape, dtype, "int8", 0, False)
    _check_shapes(entries, specs, where)
    return Packing("pack8", "int8", dtype, shape, 0, False, tuple(spec.name for spec in specs[1:]))


def _check_shapes(entries: Mapping[str, TensorEntry], specs: list[TensorSpec], where: str) -> None:
    """Are all parts there, in the dtype and shape that they must have?"""
    for spec in specs:
        entry = entries.get(spec.name)
        if entry is None:
            raise FormatError(f"{spec.name} is missing", where=where)
        if (entry.dtype, entry.shape) != (spec.dtype, spec.shape):
            raise FormatError(
                f"{spec.name} is {entry.dtype} {list(entry.shape)}, not {spec.dtype} {list(spec.shape)}", where=where
            )


def _state(text: bytes, format: str, where: str) -> dict[str, Any]:
    """The JSON of a packed tensor, checked field by field."""
    state = strictjson.loads(text, where)
    fields = dict(_FIELDS)
    if isinstance(state, dict) and any(key in state for key in _NESTED_FIELDS):
        fields |= _NESTED_FIELDS
    if not isinstance(state, dict) or state.keys() != fields.keys():
        raise FormatError("not the JSON of a packed tensor", where=where)
    for key, kind in fields.items():
        if type(state[key]) is not kind:
            raise FormatError(f"{key} is not of type {kind.__name__}", where=where)
    shape = state["shape"]
    if state["quant_type"] != format or state["blocksize"] not in BLOCK_SIZES or state["dtype"] not in FROM_TORCH:
        raise FormatError("names an unknown format, block size or dtype", where=where)
    if not shape or not all(type(size) is int and 0 < size < 2**40 for size in shape) or math.prod(shape) >= 2**60:
        raise FormatError(f"{shape} is not the shape of a weight", where=where)
    if "nested_offset" in state:
        if state["nested_blocksize"] != NESTED_BLOCK or state["nested_dtype"] != "float32":
            raise FormatError("names unknown quantization of scales", where=where)
        if not abs(state["nested_offset"]) <= float(np.finfo(np.float32).max):
            raise FormatError("nested_offset is not finite in fp32", where=where)
    return state
