"""`inspect`: what an artifact is, what is masked in it and how, and what ships in the clear. Never a secret.

model folder, single .safetensors      global model, server model, masked model, quantized or not
folder with proxy.json, update.json    proxy, update
visible.safetensors, update.safetensors   parts of those
file that names its format             job key, ledger, manifest
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedqsn_cli.artifacts import ledger, manifests
from fedqsn_cli.artifacts.manifests import ModelManifest, ProxyManifest, Quantization, UpdateManifest
from fedqsn_cli.artifacts.proxy_folder import open_visible
from fedqsn_cli.checkpoint import Checkpoint, Header, Source, read_header, resolve
from fedqsn_cli.errors import InputError, PlanError
from fedqsn_cli.masks import job_key
from fedqsn_cli.models.model import ModelTensor, model_tensors, open_model
from fedqsn_cli.models.public_base import Match, open_base
from fedqsn_cli.options import InspectOptions
from fedqsn_cli.planning.overrides import load_overrides
from fedqsn_cli.planning.placement import schedule_text
from fedqsn_cli.planning.plan import Plan, make_plan
from fedqsn_cli.planning.tensor_plan import TensorPlan
from fedqsn_cli.quantization.layout import clear_shares

_NUMBERED = re.compile(r"(?<![^.])\d+(?![^.])")  # a component that is a number, as in layers.11.mlp
_FORMAT = re.compile(rb'"format"\s*:\s*"fedqsn-(key|ledger|model|proxy|update)/\d+"')
_SNIFFED = 1 << 16  # bytes
_USUAL = Quantization(format="nf4", block_size=64, double_quant=False, layout="bnb")


@dataclass(frozen=True, slots=True)
class Contents:
    """The tensors of an artifact: how many, their parameters (elements before packing), bytes and stored dtypes."""

    tensors: int
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ClearTensors:
    """Tensors that ship neither masked nor quantized; `name` holds `*` for every layer number."""

    name: str
    role: str
    tensors: int
    parameters: int
    share: float  # of all parameters


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `inspect` found.

    Args:
        kind: "global model", "proxy", "job key" and so on.
        facts: what its manifest, or the file itself, says; plain values.
        shares: share of all parameters that ship masked and quantized, masked only, quantized only, in the clear.
        presumed: the quantization that `shares` presumes, for a model that was not quantized yet.
        clear: what is in the clear, the largest first.
        unknown: tensors that no rule knows; they are never shipped before a rule is given.
        releases: the lines of a ledger.
        plan: one row a tensor, when asked for.
        public_base: what of a public base would stand in the holes of each masked tensor, when asked for.
        problem: why there is no plan.
    """

    kind: str
    path: str
    facts: dict[str, Any] = field(default_factory=dict)
    contents: Contents | None = None
    shares: dict[str, float] | None = None
    presumed: Quantization | None = None
    clear: tuple[ClearTensors, ...] = ()
    unknown: tuple[str, ...] = ()
    releases: tuple[ledger.Release, ...] = ()
    plan: tuple[TensorPlan, ...] | None = None
    public_base: tuple[Match, ...] | None = None
    problem: str | None = None


_NO_OPTIONS = InspectOptions()


def inspect(path: str | Path, options: InspectOptions = _NO_OPTIONS) -> Inspection:
    """Tell what is at a path or hub reference; reads headers and manifests, no weights.

    Args:
        path: a model, proxy, update, key, ledger or .safetensors file; or an hf:// reference.
        options: see `InspectOptions`.

    Raises:
        InputError: nothing there that fedqsn knows, or the public base does not fit. FormatError: it is malformed.
        PlanError: the plan was asked for and cannot be made.
        KeyFileError: a key that others can read.

    Example:
        >>> inspect("global/", show_plan=True).plan
    """
    axis, overrides, public_base = options.axis, options.plan_file, options.public_base
    source = resolve(str(path))
    if source.path.is_dir():
        found = _folder(source, axis, overrides)
    elif source.path.suffix == ".safetensors":
        found = _tensors_file(source, axis, overrides)
    else:
        found = _named_format(source.path)
    if public_base is not None:
        found = replace(found, public_base=_matched(str(path), public_base, axis, overrides))
    if not options.show_plan:
        return replace(found, plan=None)
    if found.plan is None:
        raise PlanError(found.problem or f"a {found.kind} has no plan", where=path, hint="leave out --show-plan")
    return found


def _matched(path: str, base: str | Path, axis: str | None, overrides: str | Path | None) -> tuple[Match, ...]:
    """What of a public base fills the masked tensors of a model. Raises InputError."""
    rules = load_overrides(overrides) if overrides is not None else None
    return open_base(str(base), open_model(path, axis=axis or "neuron", overrides=rules)).matches


def _folder(source: Source, axis: str | None, overrides: str | Path | None) -> Inspection:
    if (source.path / manifests.PROXY_MANIFEST).is_file():
        return _proxy(source)
    if (source.path / manifests.UPDATE_MANIFEST).is_file():
        return _update(source)
    return _model(source, axis, overrides)


def _tensors_file(source: Source, axis: str | None, overrides: str | Path | None) -> Inspection:
    path = source.path
    if path.name == manifests.VISIBLE_TENSORS:
        header = read_header(path)
        facts = {"groups": len(header.entries), "meaning": "one bit a unit, set when the proxy shows it"}
        return Inspection("visible units of a proxy", str(path), facts, _stored(header))
    if path.name == manifests.UPDATE_TENSORS:
        return Inspection("tensors of an update", str(path), {}, _stored(read_header(path)))
    return _model(source, axis, overrides)


def _named_format(path: Path) -> Inspection:
    """A JSON file that says what it is, near its beginning."""
    with path.open("rb") as file:
        match = _FORMAT.search(file.read(_SNIFFED))
    kind = match[1].decode() if match else None
    if kind == "key":
        return _key(path)
    if kind == "ledger":
        return _ledger(path)
    if kind is not None:
        raise InputError(f"this is the manifest of a {kind}", where=path, hint=f"inspect its folder, {path.parent}")
    known = "a model, proxy or update folder, a .safetensors file, a job key or a ledger"
    raise InputError("not something that fedqsn made or reads", where=path, hint=f"give {known}")


def _key(path: Path) -> Inspection:
    job = job_key.load(path)
    facts = {
        "p1": job.p1,
        "axis": job.axis,
        "plan": job.plan_digest,
        "rules": len(job.overrides.get("rule", [])),
        **_hiding(job.overrides),
        "commitment": job.commitment,
    }
    return Inspection("job key", str(path), facts)


def _hiding(overrides: Mapping[str, Any]) -> dict[str, str]:
    """What a job says about where it hides, and how much; nothing for one that hides everywhere alike."""
    facts = {name: str(overrides[name]) for name in ("where", "layers") if name in overrides}
    return facts | ({"p1_schedule": schedule_text(overrides["p1"])} if "p1" in overrides else {})


def _ledger(path: Path) -> Inspection:
    releases = ledger.read(path)
    facts = {
        "releases": len(releases),
        "clients": len({release.client for release in releases}),
        "rounds": len({release.round for release in releases}),
        "jobs": sorted({release.job for release in releases}),
    }
    return Inspection("ledger", str(path), facts, releases=tuple(releases))


def _update(source: Source) -> Inspection:
    manifest = manifests.read_manifest(source.path, UpdateManifest)
    facts = manifest.model_dump(mode="json", exclude={"format", "files", "losses"})
    facts["losses"] = manifest.losses.model_dump(mode="json")
    return Inspection("update", source.reference, facts, _stored(read_header(source.path / manifests.UPDATE_TENSORS)))


def _proxy(source: Source) -> Inspection:
    manifest = manifests.read_manifest(source.path, ProxyManifest)
    with Checkpoint.open(source.path) as checkpoint:
        tensors = model_tensors(checkpoint)
        plan = make_plan({name: (t.dtype, t.shape) for name, t in tensors.items()}, checkpoint.config)
        contents = _contents(tensors, checkpoint.total_bytes)
    visible = open_visible(source.path, manifest, {name: tensor.shape for name, tensor in tensors.items()})
    with visible.stored:
        visible.require_exact()
        shown = {group: float(visible.flags(group).mean()) for group in manifest.groups}
    rows = [_as_shipped(tensor, tensors[tensor.name], manifest) for tensor in plan.tensors]
    hidden = sum(
        math.prod(row.shape) * (1 - float(np.mean([shown[group] for group in manifest.tensors[row.name].groups])))
        for row in rows
        if row.masked
    )
    facts = manifest.model_dump(mode="json", exclude={"format", "groups", "tensors", "files"})
    facts |= {"quantization": manifest.quantization, "groups": len(manifest.groups)}
    facts |= {"hidden": hidden / max(1, contents.parameters)}
    found = Inspection("proxy", source.reference, facts, contents, plan=tuple(rows))
    return _with_shares(found, rows, manifest.quantization)


def _as_shipped(tensor: TensorPlan, logical: ModelTensor, manifest: ProxyManifest) -> TensorPlan:
    """The tensor's row, with what the proxy itself says in place of what the rules would."""
    quantized = logical.packing is not None or (tensor.quantized and manifest.quantization is not None)
    units = manifest.tensors.get(tensor.name)
    if units is None:
        return replace(tensor, masked=False, axis=None, groups=(), units=0, quantized=quantized)
    size = manifest.groups[units.groups[0]].units
    return replace(tensor, masked=True, axis=units.axis, groups=units.groups, units=size, quantized=quantized)


def _model(source: Source, axis: str | None, overrides: str | Path | None) -> Inspection:
    with Checkpoint.open(source.path) as checkpoint:
        has_manifest = checkpoint.manifest is not None
        manifest = manifests.read_manifest(source.path, ModelManifest) if has_manifest else None
        tensors = model_tensors(checkpoint)
        contents = _contents(tensors, checkpoint.total_bytes)
        config = checkpoint.config
    quantization = manifest.quantization if manifest else None
    kind = ("quantized " if quantization else "") + (manifest.kind.replace("-", " ") if manifest else "global model")
    facts: dict[str, Any] = {"architecture": (config or {}).get("architectures"), "revision": source.revision}
    if manifest is not None:
        facts |= _from_manifest(manifest, tensors)
    found = Inspection(kind, source.reference, {k: v for k, v in facts.items() if v is not None}, contents)
    try:
        plan = _plan(tensors, config, manifest, axis, overrides)
    except PlanError as error:
        return replace(found, problem=str(error))
    found = replace(found, plan=plan.tensors, unknown=tuple(tensor.name for tensor in plan.unknown))
    if quantization is None:
        found = replace(found, presumed=_USUAL)
    return _with_shares(found, plan.tensors, quantization or _USUAL)


def _plan(
    tensors: dict[str, ModelTensor],
    config: dict[str, Any] | None,
    manifest: ModelManifest | None,
    axis: str | None,
    overrides: str | Path | None,
) -> Plan:
    """The plan of the manifest for a model that was masked, else that of the rules and the user's wishes."""
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    if manifest is not None and manifest.kind != "global-model":
        plan = make_plan(shapes, config, axis=manifest.axis, overrides=manifest.overrides)
        return replace(plan, tensors=tuple(_with_ratio(tensor, manifest.p1) for tensor in plan.tensors))
    rules = load_overrides(overrides) if overrides is not None else None
    return make_plan(shapes, config, axis=axis or "neuron", overrides=rules)


def _with_ratio(tensor: TensorPlan, p1: float) -> TensorPlan:
    return replace(tensor, p1=p1) if tensor.masked and tensor.p1 is None else tensor


def _from_manifest(manifest: ModelManifest, tensors: dict[str, ModelTensor]) -> dict[str, Any]:
    facts = manifest.model_dump(
        mode="json", exclude={"format", "kind", "groups", "tensors", "overrides", "quantization"}
    )
    facts |= _hiding(manifest.overrides)
    facts["quantization"] = manifest.quantization
    if manifest.groups:
        hidden = sum(
            math.prod(tensor.shape) * manifest.groups[units.groups[0]].hidden / manifest.groups[units.groups[0]].units
            for name, tensor in tensors.items()
            if (units := manifest.tensors.get(name)) is not None
        )
        facts["groups"] = len(manifest.groups)
        word = "hidden" if manifest.kind == "server-model" else "hidden_by_server"
        facts[word] = hidden / max(1, sum(math.prod(tensor.shape) for tensor in tensors.values()))
    return facts


def _with_shares(found: Inspection, rows: Sequence[TensorPlan], how: Quantization | None) -> Inspection:
    clear = [row for row in rows if not row.masked and not (row.quantized and how is not None)]
    total = max(1, sum(math.prod(row.shape) for row in rows))
    return replace(found, shares=clear_shares(rows, how), clear=_collapsed(clear, total))


def _collapsed(rows: Iterable[TensorPlan], total: int) -> tuple[ClearTensors, ...]:
    """Tensors that differ only in layer numbers, counted together; the largest first."""
    alike: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        alike.setdefault((_NUMBERED.sub("*", row.name), row.role), []).append(math.prod(row.shape))
    listed = [
        ClearTensors(name, role, len(sizes), sum(sizes), sum(sizes) / total) for (name, role), sizes in alike.items()
    ]
    return tuple(sorted(listed, key=lambda each: (-each.parameters, each.name)))


def _contents(tensors: dict[str, ModelTensor], stored: int) -> Contents:
    parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
    return Contents(len(tensors), parameters, stored, tuple(sorted({tensor.dtype for tensor in tensors.values()})))


def _stored(header: Header) -> Contents:
    entries = header.entries.values()
    elements = sum(math.prod(entry.shape) for entry in entries)
    return Contents(len(entries), elements, sum(e.nbytes for e in entries), tuple(sorted({e.dtype for e in entries})))
