"""The shape of an update: what a client writes into update.safetensors, and what the owner expects there.

An update holds U = T − P (trained minus proxy) on the units that the client saw, one tensor for each float tensor of
the model, under its own name:

    axis      shape of U
    row       [lead, visible, ...rest], lead only for expert stacks
    column    [lead, rows, visible]
    element   [visible of all lead slices]
    None      the tensor's own shape; so it is for every tensor where clients train the fill, too

The formats int8 and nf4 store the n elements of U as codes, in C order, and one scale for each block of them:

    NAME          int8: I8 in the shape of U        nf4: U8 [ceil(n / 2)], the first element in the high nibble
    NAME.absmax   F32 [ceil(n / block)]

Norms and biases (tensors of one dimension) are F32 in these formats, too: they are few and decide much.

An update of adapters (LoRA) holds factors of U instead, and a configuration, both as peft writes them:

    adapter_config.json                        rank, scale and modules, nothing about where the proxy was
    adapter_model.safetensors
        MODULE.lora_A.weight                   A [rank, in]
        MODULE.lora_B.weight                   B [out, rank]; U = scaling · B A, or its transpose
        base_model.model.NAME                  modules that were trained in full, as they are after training
    update.safetensors                         U of these modules; where there are none, there is no such file

U of every other tensor is zero.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from fedqsn_cli.artifacts.manifests import (
    ADAPTER_CONFIG,
    ADAPTER_TENSORS,
    SIGNATURE,
    UPDATE_MANIFEST,
    UPDATE_TENSORS,
    UpdateManifest,
)
from fedqsn_cli.checkpoint import TensorSpec
from fedqsn_cli.errors import InputError

SCALES = ".absmax"
"""What the name of a tensor of block scales ends with."""

PEFT_PREFIX = "base_model.model."
"""Of the names of a model's modules and parameters in files of peft."""

_ENTRY_BYTES = 512  # dtype, shape and offsets of a tensor in a header
_HEADER_BYTES = 1 << 16  # metadata


@dataclass(frozen=True, slots=True)
class Coding:
    """Codes of a number format and the scales that their levels are multiplied by.

    Args:
        format: whose levels. block: values that share a scale. per_byte: codes in a byte.
    """

    format: Literal["int8", "nf4"]
    block: int
    per_byte: int


@dataclass(frozen=True, slots=True)
class StoredFormat:
    """How an `--update-format` stores U.

    Args:
        dtype: the safetensors dtype of values, or of codes.
        coding: what the codes mean; None where values are stored as they are.
    """

    dtype: str
    coding: Coding | None = None


PLAIN = StoredFormat("F32")

UPDATE_FORMATS = {
    "fp32": PLAIN,
    "bf16": StoredFormat("BF16"),
    "fp16": StoredFormat("F16"),
    "int8": StoredFormat("I8", Coding("int8", 256, 1)),
    "nf4": StoredFormat("U8", Coding("nf4", 64, 2)),
}


def format_of(update_format: str, shape: tuple[int, ...]) -> StoredFormat:
    """How an update stores the U of a tensor; `shape` is that of the tensor in the model."""
    chosen = UPDATE_FORMATS[update_format]
    return PLAIN if chosen.coding is not None and len(shape) < 2 else chosen


def stored_specs(name: str, stored: StoredFormat, shape: tuple[int, ...]) -> list[TensorSpec]:
    """The tensors that hold the U of one tensor: its values, or its codes and then their scales.

    Args:
        name: of the tensor. shape: of its U.
    """
    if stored.coding is None:
        return [TensorSpec(name, stored.dtype, shape)]
    count, coding = math.prod(shape), stored.coding
    codes = shape if coding.per_byte == 1 else (-(-count // coding.per_byte),)
    return [
        TensorSpec(name, stored.dtype, codes),
        TensorSpec(name + SCALES, "F32", (-(-count // coding.block),)),
    ]


def files_of(manifest: UpdateManifest) -> frozenset[str]:
    """The files that an update has beside its manifest."""
    if manifest.adapters is None:
        return frozenset({UPDATE_TENSORS})
    return frozenset({ADAPTER_CONFIG, ADAPTER_TENSORS} | ({UPDATE_TENSORS} if manifest.saved else set()))


def factor_names(module: str) -> tuple[str, str]:
    """The names of A and B of an adapter in a file of peft; `module` has its prefix."""
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def lora_scaling(rank: int, alpha: float, *, rank_stabilised: bool) -> float:
    """What the product of two factors is multiplied by: α / r, or α / √r (rsLoRA, arXiv 2312.03732)."""
    return alpha / math.sqrt(rank) if rank_stabilised else alpha / rank


def require_no_more(folder: Path, manifest: UpdateManifest) -> None:
    """Refuse a folder with anything beside the files of this update: no digest covers it. Raises InputError."""
    known = {UPDATE_MANIFEST, SIGNATURE} | files_of(manifest)
    others = sorted(entry.name for entry in os.scandir(folder) if entry.name not in known)
    if others:
        raise InputError(f"holds {others[0]!r}, which is not a file of this update", where=folder, hint="take it out")


class _Named(Protocol):
    @property
    def name(self) -> str:
        """The name of a tensor."""


def most_header_bytes(tensors: Sequence[_Named]) -> int:
    """The longest header that an update of a model with these tensors has: values or codes, and scales, of each.

    Every character of a name may be written as an escape of six bytes.
    """
    return _HEADER_BYTES + sum(2 * (6 * (len(tensor.name) + len(SCALES)) + _ENTRY_BYTES) for tensor in tensors)


def require_distinct(specs: Iterable[TensorSpec]) -> None:
    """Refuse a model in which a tensor has the name of another one's scales. Raises InputError."""
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        doubled = next(name for name in names if names.count(name) > 1)
        raise InputError(f"the model has a tensor {doubled}", where="--update-format", hint="use fp32, bf16 or fp16")


def update_shape(shape: tuple[int, ...], axis: str | None, view: tuple[int, int, int], visible: int) -> tuple[int, ...]:
    """The shape of U for one tensor.

    Args:
        shape: of the tensor as it is stored.
        axis: of its units: row, column, element, or None for a tensor without units.
        view: (lead, rows, cols) of the tensor.
        visible: number of visible units, over all lead slices; each slice has as many as the others.
    """
    lead, rows, cols = view
    if axis is None:
        return shape
    if axis == "element" or len(shape) == 1:
        return (visible,)
    per_slice = visible // lead
    if len(shape) == 2 and shape != (rows, cols):  # a bias for each slice of an expert stack
        return (lead, per_slice)
    matrix = (per_slice, cols) if axis == "row" else (rows, per_slice)
    return (lead, *matrix) if len(shape) == 3 else matrix
