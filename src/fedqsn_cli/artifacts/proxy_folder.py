"""A proxy's folder: which units it shows, and whether its files are those that its owner wrote.

proxy.json            the manifest: size of each group, groups of each tensor, SHA-256 of every other file
visible.safetensors   a U8 tensor for each group, [ceil(units / 8)]: one bit a unit, the first unit in the highest
                      bit of the first byte; a set bit says that the proxy shows the unit
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.artifacts.manifests import (
    PROXY_MANIFEST,
    VISIBLE_TENSORS,
    ProxyManifest,
    Units,
    file_digest,
    read_manifest,
)
from fedqsn_cli.checkpoint import Checkpoint, FolderWriter, TensorSpec, read_header
from fedqsn_cli.checkpoint.companions import MAX_COMPANION_BYTES, is_companion
from fedqsn_cli.checkpoint.files import check_size
from fedqsn_cli.errors import FormatError
from fedqsn_cli.planning.tensor_plan import units_per_slice

Bools = NDArray[np.bool_]

_LARGE = 1 << 20  # units; of larger groups (single weights) only the last one read is kept in memory
_FETCH_AGAIN = "fetch the proxy again"


def write_visible(writer: FolderWriter, groups: Mapping[str, int], flags: Callable[[str, int], Bools]) -> None:
    """Write visible.safetensors.

    Args:
        groups: number of units by group name.
        flags: gives, for the name and the units of a group, which of them the proxy shows: [units].
    """
    specs = [TensorSpec(name, "U8", _packed_shape(units)) for name, units in sorted(groups.items())]
    stem = VISIBLE_TENSORS.removesuffix(".safetensors")
    sink = writer.tensors(stem, specs, max_shard_bytes=None, metadata={})
    for name, units in sorted(groups.items()):
        sink.write(name, 0, np.packbits(flags(name, units)))
    sink.close()


@dataclass
class VisibleUnits:
    """The units that a proxy says it shows; read when they are asked for.

    Args:
        manifest: the proxy's proxy.json.
        stored: its visible.safetensors. It may hold more tensors than `manifest` has groups.
    """

    manifest: ProxyManifest
    stored: Checkpoint
    _flags: dict[str, Bools] = field(default_factory=dict, repr=False)

    def flags(self, group: str) -> Bools:
        """Which units of a group are visible: [units]."""
        found = self._flags.get(group)
        if found is None:
            units = self.manifest.groups[group].units
            if units > _LARGE:
                self._flags.clear()
            found = np.unpackbits(self.stored.read(group), count=units).astype(np.bool_)
            self._flags[group] = found  # of several threads, each has what it found
        return found

    def slices(self, tensor: str) -> list[Bools]:
        """Which units of a tensor are visible, for each of its lead slices: [units] each."""
        units = self.manifest.tensors[tensor]
        return [self.flags(group) for group in units.groups] * (units.view[0] // len(units.groups))

    def unknown_tensors(self) -> list[str]:
        """Tensors of the file that are not groups of the manifest."""
        return sorted(set(self.stored.entries) - set(self.manifest.groups))

    def has_spare_bits(self, group: str) -> bool:
        """Is a bit set that belongs to no unit of the group?"""
        return bool(np.unpackbits(self.stored.read(group))[self.manifest.groups[group].units :].any())

    @property
    def shows_nothing(self) -> bool:
        """Is every unit hidden (p1 = 1), so that the proxy holds the public base and what clients taught it?"""
        return not any(self.flags(name).any() for name in self.manifest.groups)

    def require_exact(self) -> None:
        """Check that the file says what a client needs and nothing else.

        Raises:
            FormatError: a tensor belongs to no group, a bit to no unit, a group shows no unit while others do or
                while clients train visible units only, or the slices of a tensor show different numbers of units.
        """
        path = self.stored.path
        may_be_empty = self.shows_nothing and self.manifest.train == "all" and not self.manifest.rescale
        for name in self.unknown_tensors():
            raise FormatError(f"tensor {name!r} is not a group that proxy.json lists", where=path)
        for name in self.manifest.groups:
            if self.has_spare_bits(name):
                raise FormatError(f"group {name!r} has bits set after its last unit", where=path)
            if not (may_be_empty or self.flags(name).any()):
                raise FormatError(f"group {name!r} shows no unit", where=path)
        for name in self.manifest.tensors:
            if len({int(np.count_nonzero(flags)) for flags in self.slices(name)}) > 1:
                raise FormatError(f"the slices of tensor {name!r} show different numbers of units", where=path)


def open_visible(folder: Path, manifest: ProxyManifest, shapes: Mapping[str, Sequence[int]]) -> VisibleUnits:
    """Open visible.safetensors; no unit is read yet.

    Args:
        folder: the proxy. manifest: its proxy.json.
        shapes: shape of each of its tensors, before packing.

    Raises:
        InputError: there is no visible.safetensors. FormatError: it is malformed, or visible.safetensors, proxy.json
            and the tensors contradict each other.
    """
    stored = Checkpoint.open(folder / VISIBLE_TENSORS)
    for name, group in manifest.groups.items():
        entry = stored.entries.get(name)
        if entry is None or (entry.dtype, entry.shape) != ("U8", _packed_shape(group.units)):
            raise FormatError(f"{VISIBLE_TENSORS} has no group {name!r} of the size in proxy.json", where=folder)
    for name, units in manifest.tensors.items():
        if not _has_groups(units, manifest):
            raise FormatError(f"the groups of tensor {name!r} do not match its units", where=folder)
        if name not in shapes or math.prod(shapes[name]) != math.prod(units.view):
            raise FormatError(f"tensor {name!r} does not have the shape that proxy.json gives it", where=folder)
    if {group for units in manifest.tensors.values() for group in units.groups} != set(manifest.groups):
        raise FormatError("proxy.json lists a group that no tensor belongs to", where=folder)
    return VisibleUnits(manifest, stored)


def _packed_shape(units: int) -> tuple[int]:
    return ((units + 7) // 8,)


def _has_groups(units: Units, manifest: ProxyManifest) -> bool:
    """Does a tensor have one group, or one for each lead slice, of as many units as the slice has?"""
    lead, size = units.view[0], units_per_slice(units.axis, units.view)
    known = [manifest.groups[group].units for group in units.groups if group in manifest.groups]
    return len(known) == len(units.groups) and len(known) in {1, lead} and lead > 0 and set(known) == {size}


def verify_proxy(folder: Path) -> ProxyManifest:
    """Check every file of a proxy against the digests in its proxy.json, and that nothing else would be loaded.

    Raises:
        InputError: this is not a proxy. FormatError: a file is missing, was changed, or was added.
    """
    manifest = read_manifest(folder, ProxyManifest)
    for name, digest in sorted(manifest.files.items()):
        path = folder / name
        if not os.path.lexists(path):
            raise FormatError("is missing, though proxy.json lists it", where=path, hint=_FETCH_AGAIN)
        if name.endswith(".safetensors"):
            read_header(path)  # before all of it is read: it tells how long the file may be
        else:
            check_size(path, MAX_COMPANION_BYTES)
        if file_digest(path) != digest:
            raise FormatError("is not the file that proxy.json lists (SHA-256 differs)", where=path, hint=_FETCH_AGAIN)
    for path in sorted(folder.iterdir()):
        loaded = (
            path.name == "config.json"
            or is_companion(path.name)
            or path.name.endswith((".safetensors", ".safetensors.index.json"))
        )
        if loaded and path.name not in manifest.files and path.name != PROXY_MANIFEST:
            raise FormatError("is not listed in proxy.json", where=path, hint=f"remove it, or {_FETCH_AGAIN}")
    return manifest
