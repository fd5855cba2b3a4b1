"""What an audit works on: proxies opened without trust, and the owner's truth, key, ledger and public base.

A proxy's weights are read in runs of rows, dequantized to fp32, so that nothing grows with the model. Which units it
shows comes from its own visible.safetensors; whether that is true is what the checks find out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli import keyfile, strictjson
from fedqsn_cli import ledger as ledgers
from fedqsn_cli.artifacts import PROXY_MANIFEST, VISIBLE_TENSORS, ProxyManifest, parse_manifest
from fedqsn_cli.audit.findings import Check, Finding
from fedqsn_cli.audit.rules import finding
from fedqsn_cli.checkpoint import Checkpoint, resolve
from fedqsn_cli.errors import FedqsnError, FormatError, InputError
from fedqsn_cli.keyfile import Job
from fedqsn_cli.ledger import Release
from fedqsn_cli.logical import LogicalTensor, OpenModel, logical_tensors, open_model
from fedqsn_cli.masking import scale
from fedqsn_cli.owner import unit_table
from fedqsn_cli.plan import AXES
from fedqsn_cli.quantization import kernels
from fedqsn_cli.quantization.bnb_format import scb_name, state_name
from fedqsn_cli.quantization.nested import NESTED_BLOCK
from fedqsn_cli.roles import rules
from fedqsn_cli.storage import Storage
from fedqsn_cli.units import UnitMask

Array = NDArray[Any]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]

_SMALL = 1 << 20  # units; larger groups (single weights) are kept one at a time


@dataclass
class OpenedProxy:
    """One proxy whose files could be read. Nothing in it is believed.

    Args:
        scope: how findings name it. sha256: of proxy.json. tensors: logical tensors by name.
    """

    scope: str
    folder: Path
    checkpoint: Checkpoint
    stored_visible: Checkpoint
    manifest: ProxyManifest
    sha256: str
    tensors: dict[str, LogicalTensor]
    _groups: dict[str, Bools] = field(default_factory=dict)
    _nested: tuple[str, Floats, Floats, np.float32] | None = None

    def group(self, name: str) -> Bools:
        """The units of a group that the proxy says it shows, [units]."""
        if name not in self._groups:
            units = self.manifest.groups[name].units
            bits = np.unpackbits(self.stored_visible.read(name))
            if units > _SMALL:
                self._groups = {}
            self._groups[name] = bits[:units].astype(np.bool_)
        return self._groups[name]

    def visible(self, name: str) -> UnitMask | None:
        """The elements of a tensor that the proxy says it shows, in the stored view; None for one without units."""
        units = self.manifest.tensors.get(name)
        if units is None:
            return None
        lead = units.view[0]
        groups = [self.group(group) for group in units.groups] * (lead // len(units.groups))
        return UnitMask.of(units.axis, units.view, groups)

    def factor(self, name: str) -> np.float32:
        """What the visible part of a tensor was multiplied by: n / |V|, or 1."""
        units = self.manifest.tensors.get(name)
        if units is None or not self.manifest.rescale:
            return np.float32(1)
        flags = self.group(units.groups[0])
        return scale(flags.size, flags.size - int(np.count_nonzero(flags)), 0)

    def layout(self, name: str) -> Storage:
        """How the tensor is really stored, whatever the plan says; snapped values count as raw ones."""
        logical = self.tensors[name]
        units = self.manifest.tensors.get(name)
        axis = units.axis if units is not None else None
        turned = self.turned(name)
        if logical.packing is not None:
            rows, cols = logical.packing.shape
            axis = _TURNED[axis] if turned and axis is not None else axis
            return Storage(logical.packing.kind, "flat", turned, (1, rows, cols), axis)
        view = units.view if units is not None else natural_view(logical.shape)
        return Storage("raw", "flat", False, view, axis)

    def turned(self, name: str) -> bool:
        """Is it a packed Conv1D weight, which bitsandbytes stores as [out, in]?"""
        role = rules().role(name, 2, (self.checkpoint.config or {}).get("model_type"))
        return self.tensors[name].packing is not None and role is not None and role.name == "conv1d"

    def codes(self, name: str, first: int, count: int) -> NDArray[np.uint8]:
        """Packed 4-bit codes of `count` elements from element `first` (even): [ceil(count / 2)]."""
        out = np.empty((count + 1) // 2, np.uint8)
        self.checkpoint.read_into(name, first // 2, out)
        return out

    def scales(self, name: str, first: int, count: int) -> Floats:
        """Scales of `count` blocks (4-bit) or rows (int8) from `first`: fp32 [count]. Raises FormatError."""
        packing = self.tensors[name].packing
        assert packing is not None
        stored = scb_name(name) if packing.kind == "pack8" else f"{name}.absmax"
        out: Array = np.empty(count, np.uint8 if packing.double else np.float32)
        self.checkpoint.read_into(stored, first * out.itemsize, out)
        absmax: Floats = out
        if packing.double:
            nested, levels, offset = self._nested_of(name, packing.format)
            absmax = levels[out] * nested[np.arange(first, first + count) // NESTED_BLOCK] + offset
        if not np.isfinite(absmax).all():
            raise FormatError("a block scale is NaN or infinite", where=f"{self.scope}: {stored}")
        return absmax

    def _nested_of(self, name: str, format: str) -> tuple[Floats, Floats, np.float32]:
        if self._nested is None or self._nested[0] != name:
            text = bytes(self.checkpoint.read(state_name(name, format)))
            offset = np.float32(strictjson.loads(text, name)["nested_offset"])
            nested, levels = (self.checkpoint.read(f"{name}.nested_{part}") for part in ("absmax", "quant_map"))
            self._nested = name, nested, levels, offset
        return self._nested[1:]

    def values(self, name: str, storage: Storage, first: int, rows: int) -> Floats:
        """Rows of a tensor as a client computes with them, in fp32: [rows, cols] of the working view of `storage`.

        Args:
            storage: the planned storage; where the tensor is stored otherwise, its values are still found.

        Raises:
            FormatError: the tensor has another number of elements, or its scales are not finite.
        """
        lead, height, cols = storage.view
        if name not in self.tensors:
            raise FormatError("a tensor of the model is missing", where=f"{self.scope}: {name}")
        packing = self.tensors[name].packing
        if math.prod(self.tensors[name].shape) != lead * height * cols:
            raise FormatError("has another shape than the truth", where=f"{self.scope}: {name}")
        if packing is None:
            return self._plain(name, storage, first, rows)
        out = np.empty((rows, cols), np.float32)
        if packing.shape != (lead * height, cols):
            raise FormatError("has another shape than the truth", where=f"{self.scope}: {name}")
        if packing.kind == "pack8":
            codes = np.empty((rows, cols), np.int8)
            self.checkpoint.read_into(name, first * cols, codes)
            kernels.dequantize_int8(codes, self.scales(name, first, rows), "F32", out)
            return out
        start, block = first * cols, packing.block
        lower = start // block * block  # of the block that the rows begin in
        flat = out if lower == start else np.empty(start - lower + out.size, np.float32)
        kernels.dequantize_4bit(
            self.codes(name, lower, flat.size), self.scales(name, lower // block, -(-flat.size // block)),
            format=packing.format, block=block, dtype="F32", out=flat,
        )  # fmt: skip
        return flat.reshape(-1)[start - lower :].reshape(rows, cols)

    def _plain(self, name: str, storage: Storage, first: int, rows: int) -> Floats:
        """Dense values; those of a transposed tensor lie as in the truth."""
        entry, cols = self.checkpoint.entries[name], storage.view[2]
        if entry.dtype not in kernels_dtypes():
            raise FormatError(f"{entry.dtype} values where floats belong", where=f"{self.scope}: {name}")
        kind = kernels_dtypes()[entry.dtype]
        if storage.transposed:
            whole = np.empty((cols, storage.view[1]), kind)
            self.checkpoint.read_into(name, 0, whole)
            turned: Floats = kernels.widened(whole, entry.dtype).reshape(whole.shape).T[first : first + rows]
            return np.ascontiguousarray(turned)
        out = np.empty((rows, cols), kind)
        self.checkpoint.read_into(name, first * cols * out.itemsize, out)
        wide: Floats = kernels.widened(out, entry.dtype).reshape(rows, cols)
        return wide


_TURNED: dict[str, Any] = {"row": "column", "column": "row", "element": "element"}


def kernels_dtypes() -> dict[str, type[np.generic]]:
    """Float dtypes that are read as bits, and the numpy type for them."""
    return {"F32": np.float32, "F16": np.uint16, "BF16": np.uint16}


def natural_view(shape: Sequence[int]) -> tuple[int, int, int]:
    """(lead, rows, cols) of a tensor without units."""
    if len(shape) < 2:
        return 1, 1, math.prod(shape)
    return math.prod(shape[:-2]), shape[-2], shape[-1]


@dataclass(frozen=True, slots=True)
class ProxyFolder:
    """A proxy as it was named: its folder and, if its files can be read, what is in it."""

    scope: str
    folder: Path
    opened: OpenedProxy | None


@dataclass(frozen=True)
class Inputs:
    """Everything that an audit was given.

    Args:
        truth: the global model that the proxies were exported from. after: the global model of the next round.
        releases: the ledger. base: a public base checkpoint.
    """

    folders: tuple[ProxyFolder, ...] = ()
    truth: OpenModel | None = None
    after: OpenModel | None = None
    job: Job | None = None
    releases: tuple[Release, ...] | None = None
    base: OpenModel | None = None

    @property
    def proxies(self) -> tuple[OpenedProxy, ...]:
        """The proxies that can be read."""
        return tuple(folder.opened for folder in self.folders if folder.opened is not None)

    def release(self, proxy: OpenedProxy) -> Release | None:
        """The ledger line of a proxy, by its id."""
        return next((one for one in self.releases or () if one.proxy_id == proxy.manifest.proxy_id), None)


@dataclass
class Report:
    """Findings and checks as they come in."""

    findings: list[Finding] = field(default_factory=list)
    checked: list[Check] = field(default_factory=list)

    def add(self, rule: str, scope: str, why: str, found: Sequence[Finding]) -> None:
        """A check that ran: it passed if it found nothing."""
        self.findings += found
        self.checked.append(Check(rule, scope, "fail" if found else "pass", why))

    def skip(self, rule: str, scope: str, why: str) -> None:
        """A check that could not run."""
        self.checked.append(Check(rule, scope, "not-run", why))


def open_inputs(
    proxies: Sequence[str | Path],
    report: Report,
    *,
    truth: str | Path | None = None,
    after: str | Path | None = None,
    key: str | Path | None = None,
    ledger: str | Path | None = None,
    base: str | Path | None = None,
) -> Inputs:
    """Open everything; what cannot be read or does not belong becomes an FQ903 or FQ904 finding, and is left out."""
    job = _tried("key", report, lambda: keyfile.load(key) if key is not None else None)
    releases = _tried("ledger", report, lambda: tuple(ledgers.read(Path(ledger))) if ledger is not None else None)
    folders = tuple(_open_folder(scope, place, report) for scope, place in _named(proxies))
    axis = job.axis if job is not None else _axis_of(truth, folders)
    overrides = job.overrides if job is not None else None

    def model(reference: str | Path | None, wanted: str) -> OpenModel | None:
        opened = open_model(str(reference), axis=axis, overrides=overrides) if reference is not None else None
        return None if opened is None else _belonging(opened, wanted, job, folders, report)

    whole = _tried("truth", report, lambda: model(truth, "truth"))
    return Inputs(
        tuple(_fitting(folder, whole, report) for folder in folders),
        whole,
        _tried("after", report, lambda: model(after, "after")),
        job,
        releases,
        _tried("base", report, lambda: model(base, "base")),
    )


def _named(proxies: Sequence[str | Path]) -> list[tuple[str, str]]:
    """(scope, reference) of each proxy; scopes are the directories' names, told apart by a number where equal."""
    seen: dict[str, int] = {}
    named = []
    for place in map(str, proxies):
        name = place.rstrip("/").rsplit("/", 1)[-1] or place
        seen[name] = seen.get(name, 0) + 1
        named.append((f"proxy {name}" + (f" #{seen[name]}" if seen[name] > 1 else ""), place))
    return named


def _tried(scope: str, report: Report, call: Any) -> Any:
    """The result of a call, or None with a finding."""
    try:
        return call()
    except (FedqsnError, OSError) as error:
        report.findings.append(finding("FQ903", scope, _said(error)))
        return None


def _said(error: Exception) -> str:
    """What went wrong, without the path where."""
    return error.what if isinstance(error, FedqsnError) else f"cannot be read ({type(error).__name__})"


def _open_folder(scope: str, place: str, report: Report) -> ProxyFolder:
    folder = Path(place)
    try:
        folder = resolve(place).path
        return ProxyFolder(scope, folder, open_proxy(folder, scope))
    except (FedqsnError, OSError) as error:
        report.findings.append(finding("FQ903", scope, f"the proxy cannot be read: {_said(error)}"))
        return ProxyFolder(scope, folder, None)


def open_proxy(folder: Path, scope: str) -> OpenedProxy:
    """Open one proxy; no weight is read yet.

    Raises:
        InputError: it is not there. FormatError: a file is malformed, or its files contradict each other.
    """
    try:
        data = (folder / PROXY_MANIFEST).read_bytes()
    except OSError:
        raise InputError("no proxy.json here", where=folder) from None
    manifest = parse_manifest(data, ProxyManifest, folder / PROXY_MANIFEST)
    checkpoint = Checkpoint.open(folder)
    visible = Checkpoint.open(folder / VISIBLE_TENSORS)
    tensors = logical_tensors(checkpoint)
    proxy = OpenedProxy(scope, folder, checkpoint, visible, manifest, hashlib.sha256(data).hexdigest(), tensors)
    _check_groups(proxy)
    return proxy


def _check_groups(proxy: OpenedProxy) -> None:
    """Do proxy.json, visible.safetensors and the tensors fit together? Raises FormatError."""
    manifest = proxy.manifest
    for name, group in manifest.groups.items():
        entry = proxy.stored_visible.entries.get(name)
        if entry is None or entry.dtype != "U8" or entry.shape != ((group.units + 7) // 8,):
            raise FormatError(f"visible.safetensors does not hold group {name!r} as proxy.json has it")
    for name, units in manifest.tensors.items():
        lead, rows, cols = units.view
        size = {"row": rows, "column": cols, "element": rows * cols}[units.axis]
        sizes = {manifest.groups[group].units if group in manifest.groups else -1 for group in units.groups}
        if sizes != {size} or len(units.groups) not in (1, lead):
            raise FormatError(f"the groups of tensor {name!r} do not have its units")
        if name not in proxy.tensors or math.prod(proxy.tensors[name].shape) != lead * rows * cols:
            raise FormatError(f"tensor {name!r} does not have the shape that proxy.json gives it")


def _axis_of(truth: str | Path | None, folders: Sequence[ProxyFolder]) -> str:
    """Without a key, the axis whose plan is the proxies' own."""
    opened = next((folder.opened for folder in folders if folder.opened is not None), None)
    if truth is not None and opened is not None:
        for axis in AXES:
            try:
                if unit_table(open_model(str(truth), axis=axis).plan.tensors) == opened.manifest.tensors:
                    return axis
            except (FedqsnError, OSError):
                break
    return "neuron"


def _belonging(
    model: OpenModel, wanted: str, job: Job | None, folders: Sequence[ProxyFolder], report: Report
) -> OpenModel | None:
    """The model, if it can be compared with; else None with a finding."""
    problem = None
    if model.kind == "masked-model" or model.is_quantized:
        problem = "is on its way to a proxy; give the dense global model"
    elif model.kind == "server-model" and wanted == "truth":
        problem = "is a server model, in which hidden weights are missing; give the global model"
    elif job is not None and wanted != "base" and model.plan.digest != job.plan_digest:
        problem = "has another plan than the key"
    elif job is None and wanted == "truth":
        table = unit_table(model.plan.tensors)
        odd = [one.scope for one in folders if one.opened is not None and one.opened.manifest.tensors != table]
        if odd:
            problem = f"has other units than {odd[0]} lists; give the key, which knows the plan"
    if problem is None:
        return model
    report.findings.append(finding("FQ904", wanted, f"the {wanted} {problem}"))
    return None


def _fitting(folder: ProxyFolder, truth: OpenModel | None, report: Report) -> ProxyFolder:
    """A proxy whose list of units is not the plan's cannot be compared; its list is a lie, or its key another one."""
    if truth is None or folder.opened is None or folder.opened.manifest.tensors == unit_table(truth.plan.tensors):
        return folder
    message = "proxy.json lists other units than the plan of the truth, so its weights were not compared"
    report.findings.append(finding("FQ005", folder.scope, message))
    return ProxyFolder(folder.scope, folder.folder, None)
