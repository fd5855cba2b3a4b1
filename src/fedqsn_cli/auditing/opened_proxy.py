"""One proxy, opened without trust: its weights in runs of rows, dequantized to fp32, and what it says it shows."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli import strictjson
from fedqsn_cli.artifacts.manifests import PROXY_MANIFEST, ProxyManifest, missing_manifest, parse_manifest
from fedqsn_cli.artifacts.proxy_folder import VisibleUnits, open_visible
from fedqsn_cli.auditing.stored_rows import StoredRows
from fedqsn_cli.checkpoint import Checkpoint
from fedqsn_cli.checkpoint.files import read_file
from fedqsn_cli.dtypes import DTYPES, WEIGHT_DTYPES
from fedqsn_cli.errors import FormatError
from fedqsn_cli.masks.draw import rescale_factor
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.models.model import ModelTensor, model_tensors
from fedqsn_cli.planning.roles import rules
from fedqsn_cli.planning.tensor_plan import TRANSPOSED
from fedqsn_cli.quantization.bnb_format import Packing, scb_name, state_name
from fedqsn_cli.quantization.layout import TensorLayout
from fedqsn_cli.quantization.nested_scales import NESTED_BLOCK

Array = NDArray[Any]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]


@dataclass
class OpenedProxy:
    """One proxy whose files could be read. Nothing in it is believed.

    Args:
        scope: how findings name it. sha256: of proxy.json. tensors: model tensors by name.
        mismatched: tensors that are not as an export makes them, once that was checked.
        masks_proven: whether its masks were found to be those of the key.
        reproduced: whether an export wrote the same bytes again.
    """

    scope: str
    folder: Path
    checkpoint: Checkpoint
    units: VisibleUnits
    manifest: ProxyManifest
    sha256: str
    tensors: dict[str, ModelTensor]
    mismatched: set[str] | None = None
    masks_proven: bool = False
    reproduced: bool = False
    _nested: tuple[str, Floats, Floats, np.float32] | None = None

    @property
    def scopes(self) -> tuple[str, ...]:
        """As checks take it."""
        return (self.scope,)

    @property
    def suspects(self) -> list[str]:
        """The tensors that nothing has proven right, by name."""
        names = set(self.tensors)
        return sorted(names if self.mismatched is None else names & self.mismatched)

    def group(self, name: str) -> Bools:
        """The units of a group that the proxy says it shows, [units]."""
        return self.units.flags(name)

    def visible(self, name: str) -> UnitMask | None:
        """The elements of a tensor that the proxy says it shows, in the stored view; None for one without units."""
        units = self.manifest.tensors.get(name)
        return UnitMask.from_groups(units.axis, units.view, self.units.slices(name)) if units is not None else None

    def factor(self, name: str) -> np.float32:
        """What the visible part of a tensor was multiplied by: n / |V|, or 1."""
        units = self.manifest.tensors.get(name)
        if units is None or not self.manifest.rescale:
            return np.float32(1)
        flags = self.group(units.groups[0])
        if not flags.any():  # another check says that a proxy cannot be so
            return np.float32(1)
        return rescale_factor(flags.size, flags.size - int(np.count_nonzero(flags)), 0)

    def layout(self, name: str) -> TensorLayout:
        """How the tensor is really stored, whatever the plan says; snapped values count as raw ones."""
        tensor = self.tensors[name]
        units = self.manifest.tensors.get(name)
        axis = units.axis if units is not None else None
        if tensor.packing is not None:
            rows, cols = tensor.packing.shape
            transposed = self.is_transposed(name)
            axis = TRANSPOSED[axis] if transposed and axis is not None else axis
            return TensorLayout(tensor.packing.kind, "flat", transposed, (1, rows, cols), axis)
        view = units.view if units is not None else natural_view(tensor.shape)
        return TensorLayout("raw", "flat", False, view, axis)

    def is_transposed(self, name: str) -> bool:
        """Is it a packed Conv1D weight, which bitsandbytes stores as [out, in]?"""
        role = rules().role(name, 2, (self.checkpoint.config or {}).get("model_type"))
        return self.tensors[name].packing is not None and role is not None and role.name == "conv1d"

    def packing(self, name: str, layout: TensorLayout) -> Packing | None:
        """How a tensor is packed; None for a dense one. Raises FormatError: it has not the shape of the planned one."""
        if name not in self.tensors:
            raise FormatError("a tensor of the model is missing", where=f"{self.scope}: {name}")
        tensor, (lead, height, cols) = self.tensors[name], layout.view
        packed = tensor.packing is not None and tensor.packing.shape != (lead * height, cols)
        if packed or math.prod(tensor.shape) != lead * height * cols:
            raise FormatError("has another shape than the truth", where=f"{self.scope}: {name}")
        return tensor.packing

    def codes(self, name: str, first: int, count: int) -> NDArray[np.uint8]:
        """Packed 4-bit codes of `count` elements from element `first` (even): [ceil(count / 2)]. Read-only."""
        return self.checkpoint.view(name, first // 2, (count + 1) // 2)

    def scales(self, name: str, packing: Packing, first: int, count: int) -> Floats:
        """Scales of `count` blocks (4-bit) or rows (int8) from `first`: fp32 [count]. Raises FormatError."""
        stored = _scales_of(name, packing)
        width = 1 if packing.double else 4
        absmax: Array = self.checkpoint.view(stored, first * width, count * width)
        if packing.double:
            nested, levels, offset = self._nested_of(name, packing.format)
            absmax = levels[absmax] * nested[np.arange(first, first + count) // NESTED_BLOCK] + offset
        else:
            absmax = absmax.view(np.float32)
        if not np.isfinite(absmax).all():
            raise FormatError("a block scale is NaN or infinite", where=f"{self.scope}: {stored}")
        return absmax

    def _nested_of(self, name: str, format: str) -> tuple[Floats, Floats, np.float32]:
        found = self._nested
        if found is None or found[0] != name:
            text = bytes(self.checkpoint.read(state_name(name, format)))
            offset = np.float32(strictjson.loads(text, name)["nested_offset"])
            nested, levels = (self.checkpoint.read(f"{name}.nested_{part}") for part in ("absmax", "quant_map"))
            found = self._nested = name, nested, levels, offset  # of several threads, each has what it found
        return found[1:]

    def values(self, name: str, layout: TensorLayout, first: int, rows: int) -> Floats:
        """Rows of a tensor as a client computes with them, in fp32: [rows, cols]. As `stored`."""
        return self.stored(name, layout, first, rows).values()

    def stored(self, name: str, layout: TensorLayout, first: int, rows: int) -> StoredRows:
        """Rows of a tensor of the working view of `layout`.

        Args:
            layout: the planned one; where the tensor is stored otherwise, its values are still found.

        Raises:
            FormatError: the tensor has another number of elements, or its scales are not finite.
        """
        packing, cols = self.packing(name, layout), layout.view[2]
        if packing is None:
            return StoredRows.of(self._dense(name, layout, first, rows), self.checkpoint.entries[name].dtype)
        if packing.kind == "pack8":
            codes = self.checkpoint.view(name, first * cols, rows * cols).view(np.int8).reshape(rows, cols)
            return StoredRows(rows, cols, codes, "I8", packing, self.scales(name, packing, first, rows))
        lower = first * cols // packing.block  # the block that the rows begin in
        skipped = first * cols - lower * packing.block
        count = skipped + rows * cols
        scales = self.scales(name, packing, lower, -(-count // packing.block))
        return StoredRows(rows, cols, self.codes(name, lower * packing.block, count), "U8", packing, scales, skipped)

    def _dense(self, name: str, layout: TensorLayout, first: int, rows: int) -> Array:
        """Stored bits; those of a transposed tensor are stored as in the truth."""
        entry, cols = self.checkpoint.entries[name], layout.view[2]
        if entry.dtype not in WEIGHT_DTYPES:
            raise FormatError(f"{entry.dtype} values where floats belong", where=f"{self.scope}: {name}")
        kind = np.dtype(DTYPES[entry.dtype].bits)
        if layout.transposed:
            whole: Array = self.checkpoint.view(name, 0, entry.nbytes).view(kind)
            return np.ascontiguousarray(whole.reshape(cols, -1).T[first : first + rows])
        width = kind.itemsize * cols
        return self.checkpoint.view(name, first * width, rows * width).view(kind).reshape(rows, cols)

    def expect_rows(self, name: str, layout: TensorLayout, first: int, rows: int) -> None:
        """Begin to read rows that `stored` will be asked for, and an export's bytes be compared with after that."""
        entry, tensor = self.checkpoint.entries.get(name), self.tensors.get(name)
        if entry is None or tensor is None:
            return
        total = layout.view[0] * layout.view[1]
        begin, end = entry.nbytes * first // total, entry.nbytes * (first + rows) // total
        self.checkpoint.expect(name, begin, end - begin)
        for companion in tensor.packing.companions if tensor.packing is not None and not first else ():
            self.checkpoint.expect(companion, 0, self.checkpoint.entries[companion].nbytes)


def _scales_of(name: str, packing: Packing) -> str:
    return scb_name(name) if packing.kind == "pack8" else f"{name}.absmax"


def natural_view(shape: Sequence[int]) -> tuple[int, int, int]:
    """(lead, rows, cols) of a tensor without units."""
    if len(shape) < 2:
        return 1, 1, math.prod(shape)
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def open_proxy(folder: Path, scope: str) -> OpenedProxy:
    """Open one proxy; no weight is read yet.

    Raises:
        InputError: it is not there. FormatError: a file is malformed, or its files contradict each other.
    """
    if not os.path.lexists(folder / PROXY_MANIFEST):
        raise missing_manifest(folder, ProxyManifest)
    data = read_file(folder / PROXY_MANIFEST, ProxyManifest.LARGEST)
    manifest = parse_manifest(data, ProxyManifest, folder / PROXY_MANIFEST)
    checkpoint = Checkpoint.open(folder)
    tensors = model_tensors(checkpoint)
    units = open_visible(folder, manifest, {name: tensor.shape for name, tensor in tensors.items()})
    return OpenedProxy(scope, folder, checkpoint, units, manifest, hashlib.sha256(data).hexdigest(), tensors)
