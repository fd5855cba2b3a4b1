"""`fedqsn inspect`: what an artifact is, what is masked in it and how, and what ships in the clear. Never a secret.

path                                      is
model folder, single .safetensors file    global model, server model, masked model, quantized or not
folder with proxy.json, update.json,
partial.json                              proxy, update, partial sum of updates
visible.safetensors, update.safetensors,
adapter_model.safetensors                 a part of those
JSON file that names its format           job key, ledger, manifest
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedqsn_cli.artifacts import ledger, manifests
from fedqsn_cli.artifacts.manifests import ModelManifest, ProxyManifest, Quantization, UpdateManifest
from fedqsn_cli.artifacts.partial_folder import PARTIAL_MANIFEST, PARTIAL_TENSORS, PartialManifest
from fedqsn_cli.artifacts.proxy_folder import open_visible
from fedqsn_cli.artifacts.update_folder import files_of
from fedqsn_cli.checkpoint import Checkpoint, Header, Source, read_header, resolve
from fedqsn_cli.checkpoint.files import open_regular_file
from fedqsn_cli.errors import InputError, PlanError
from fedqsn_cli.masks import job_key
from fedqsn_cli.models.model import ModelTensor, model_tensors, open_model
from fedqsn_cli.models.plan_file import load_overrides
from fedqsn_cli.models.public_base import Match, open_base
from fedqsn_cli.options import InspectOptions
from fedqsn_cli.planning.placement import schedule_text
from fedqsn_cli.planning.plan import Plan, make_plan
from fedqsn_cli.planning.tensor_plan import TensorPlan
from fedqsn_cli.quantization.layout import clear_shares

_LAYER_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a component that is a number, as in layers.11.mlp
_FORMAT = re.compile(rb'"format"\s*:\s*"fedqsn-(key|ledger|model|partial|proxy|update)/\d+"')
_FORMAT_WITHIN = 1 << 16  # first bytes of a file, which must name its format
_DEFAULT_QUANTIZATION = Quantization(format="nf4", block_size=64, double_quant=False, layout="bnb")
_DEFAULTS = InspectOptions()
_NOTHING_SENT = "all of it is the public base, or what clients taught it; nothing of the owner's model is in it"


@dataclass(frozen=True, slots=True)
class TensorTotals:
    """The tensors of an artifact: how many, their parameters (elements before packing), bytes and stored dtypes."""

    tensors: int
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]

    @classmethod
    def of_model(cls, tensors: Mapping[str, ModelTensor], stored_bytes: int) -> TensorTotals:
        """The totals of a model or proxy."""
        return cls(len(tensors), _parameters(tensors.values()), stored_bytes, _dtypes(tensors.values()))

    @classmethod
    def of_files(cls, *headers: Header) -> TensorTotals:
        """The totals of .safetensors files, whatever is in them."""
        entries = [entry for header in headers for entry in header.entries.values()]
        return cls(len(entries), _parameters(entries), sum(entry.nbytes for entry in entries), _dtypes(entries))


@dataclass(frozen=True, slots=True)
class ClearTensors:
    """Tensors that ship neither masked nor quantized; in `name`, `*` stands for every layer number."""

    name: str
    role: str
    tensors: int
    parameters: int
    share: float  # of all parameters


@dataclass(frozen=True, slots=True)
class Inspection:
    """The result of `inspect`.

    Args:
        kind: "global model", "proxy", "job key" and so on.
        facts: what its manifest, or the file itself, says; plain values.
        shares: share of all parameters that ship masked and quantized, masked only, quantized only, in the clear.
        presumed: the quantization that `shares` presumes, for a model that is not quantized.
        clear: what is in the clear, the largest first.
        unknown: tensors that no rule knows; they are never shipped before a rule is given.
        releases: the lines of a ledger.
        plan: one row for each tensor, if asked for.
        public_base: what of a public base would fill the holes of each masked tensor, if asked for.
        problem: why there is no plan.
    """

    kind: str
    path: str
    facts: dict[str, Any] = field(default_factory=dict)
    contents: TensorTotals | None = None
    shares: dict[str, float] | None = None
    presumed: Quantization | None = None
    clear: tuple[ClearTensors, ...] = ()
    unknown: tuple[str, ...] = ()
    releases: tuple[ledger.Release, ...] = ()
    plan: tuple[TensorPlan, ...] | None = None
    public_base: tuple[Match, ...] | None = None
    problem: str | None = None


def inspect(path: str | Path, options: InspectOptions = _DEFAULTS) -> Inspection:
    """Describe an artifact. Reads headers and manifests, no weights.

    Args:
        path: a model, proxy, update, key, ledger or .safetensors file; or an hf:// reference.
        options: see `InspectOptions`.

    Raises:
        InputError: fedqsn does not know what is there, or the public base does not fit it. FormatError: it is
            malformed. PlanError: the plan was asked for and cannot be made. KeyFileError: others can read a key.

    Example:
        >>> inspect("global/", show_plan=True).plan
    """
    source = resolve(str(path))
    inspection = _inspect(source, options)
    if options.public_base is not None:
        inspection = replace(inspection, public_base=_matches(str(path), str(options.public_base), options))
    if not options.show_plan:
        return replace(inspection, plan=None)
    if inspection.plan is None:
        if inspection.problem is not None:
            raise PlanError(inspection.problem)
        raise PlanError(f"this {inspection.kind} has no plan", where=path, hint="leave out --show-plan")
    return inspection


def _inspect(source: Source, options: InspectOptions) -> Inspection:
    path = source.path
    if (path / manifests.PROXY_MANIFEST).is_file():
        return _proxy(source)
    if (path / manifests.UPDATE_MANIFEST).is_file():
        return _update(source)
    if (path / PARTIAL_MANIFEST).is_file():
        return _partial(source)
    if path.name == manifests.VISIBLE_TENSORS and path.is_file():
        header = read_header(path)
        facts = {"groups": len(header.entries), "meaning": "one bit a unit, set when the proxy shows it"}
        return Inspection("visible units of a proxy", str(path), facts, TensorTotals.of_files(header))
    if path.name in (manifests.UPDATE_TENSORS, manifests.ADAPTER_TENSORS) and path.is_file():
        return Inspection("tensors of an update", str(path), contents=TensorTotals.of_files(read_header(path)))
    if path.is_dir() or path.suffix == ".safetensors":
        return _model(source, options)
    return _json_file(path)


def _matches(path: str, base: str, options: InspectOptions) -> tuple[Match, ...]:
    """What of a public base would fill the masked tensors of a model. Raises InputError."""
    model = open_model(path, axis=options.axis or "neuron", overrides=_plan_rules(options))
    return open_base(base, model).matches


def _plan_rules(options: InspectOptions) -> dict[str, Any] | None:
    return load_overrides(options.plan_file) if options.plan_file is not None else None


def _json_file(path: Path) -> Inspection:
    """A key or a ledger, which names its format near its start."""
    with open(open_regular_file(path), "rb") as file:
        match = _FORMAT.search(file.read(_FORMAT_WITHIN))
    kind = match[1].decode() if match else None
    if kind == "key":
        return _key(path)
    if kind == "ledger":
        return _ledger(path)
    if kind is not None:
        raise InputError(f"this is the manifest of a {kind}", where=path, hint=f"inspect its folder, {path.parent}")
    known = "a model, proxy or update folder, a .safetensors file, a job key or a ledger"
    raise InputError("not an artifact that fedqsn knows", where=path, hint=f"give {known}")


def _key(path: Path) -> Inspection:
    job = job_key.load(path)
    facts = {
        "p1": job.p1,
        "axis": job.axis,
        "plan": job.plan_digest,
        "rules": len(job.overrides.get("rule", [])),
        **_placement(job.overrides),
        "job": job.commitment,
    }
    return Inspection("job key", str(path), facts)


def _placement(overrides: Mapping[str, Any]) -> dict[str, str]:
    """Where a job hides units, and how many, as far as it does not hide alike everywhere."""
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
    facts = manifest.model_dump(mode="json", exclude={"format", "files", "losses", "adapters", "saved"})
    facts["losses"] = manifest.losses.model_dump(mode="json")
    if manifest.adapters is not None:
        facts["adapters"] = len(manifest.adapters)
        facts["ranks"] = sorted({adapter.rank for adapter in manifest.adapters.values()})
        facts["trained_in_full"] = sorted(manifest.saved or {})
    names = sorted(files_of(manifest) - {manifests.ADAPTER_CONFIG})
    totals = TensorTotals.of_files(*(read_header(source.path / name) for name in names))
    return Inspection("update", source.reference, facts, totals)


def _partial(source: Source) -> Inspection:
    manifest = manifests.read_manifest(source.path, PartialManifest)
    facts = manifest.model_dump(mode="json", exclude={"format", "files", "clients", "seal"})
    facts["clients"] = len(manifest.clients)
    facts["examples"] = sum(client.num_examples for client in manifest.clients)
    totals = TensorTotals.of_files(read_header(source.path / PARTIAL_TENSORS))
    return Inspection("partial sum", source.reference, facts, totals)


def _proxy(source: Source) -> Inspection:
    manifest = manifests.read_manifest(source.path, ProxyManifest)
    with Checkpoint.open(source.path) as checkpoint:
        tensors = model_tensors(checkpoint)
        plan = make_plan({name: (t.dtype, t.shape) for name, t in tensors.items()}, checkpoint.config)
        totals = TensorTotals.of_model(tensors, checkpoint.total_bytes)
    shown = _shown(source.path, manifest, tensors)  # first: it checks the manifest
    rows = [_as_shipped(tensor, tensors[tensor.name], manifest) for tensor in plan.tensors]
    hidden = sum(math.prod(row.shape) * (1 - shown[row.name]) for row in rows if row.masked)
    nothing = not any(shown.values())
    facts = manifest.model_dump(mode="json", exclude={"format", "groups", "tensors", "files"})
    facts |= {"quantization": manifest.quantization, "groups": len(manifest.groups)}
    facts |= {"hidden": 1.0 if nothing else hidden / max(1, totals.parameters)}
    facts |= {"meaning": _NOTHING_SENT} if nothing else {}
    inspection = Inspection("proxy", source.reference, facts, totals, plan=tuple(rows))
    return _with_shares(inspection, rows, manifest.quantization)


def _as_shipped(tensor: TensorPlan, stored: ModelTensor, manifest: ProxyManifest) -> TensorPlan:
    """The row of a tensor, with what the proxy itself says in place of what the rules would."""
    quantized = stored.packing is not None or (tensor.quantized and manifest.quantization is not None)
    units = manifest.tensors.get(tensor.name)
    if units is None:
        return replace(tensor, masked=False, axis=None, groups=(), units=0, quantized=quantized)
    size = manifest.groups[units.groups[0]].units
    return replace(tensor, masked=True, axis=units.axis, groups=units.groups, units=size, quantized=quantized)


def _shown(folder: Path, manifest: ProxyManifest, tensors: Mapping[str, ModelTensor]) -> dict[str, float]:
    """The share of its units that a proxy shows, for each masked tensor. Raises FormatError."""
    visible = open_visible(folder, manifest, {name: tensor.shape for name, tensor in tensors.items()})
    with visible.stored:
        visible.require_exact()
        shares = {group: float(visible.flags(group).mean()) for group in manifest.groups}
    return {name: float(np.mean([shares[group] for group in units.groups])) for name, units in manifest.tensors.items()}


def _model(source: Source, options: InspectOptions) -> Inspection:
    with Checkpoint.open(source.path) as checkpoint:
        has_manifest = checkpoint.manifest is not None
        manifest = manifests.read_manifest(source.path, ModelManifest) if has_manifest else None
        tensors = model_tensors(checkpoint)
        totals = TensorTotals.of_model(tensors, checkpoint.total_bytes)
        config = checkpoint.config
    quantization = manifest.quantization if manifest else None
    kind = manifest.described if manifest else "global model"
    facts: dict[str, Any] = {"architecture": (config or {}).get("architectures"), "revision": source.revision}
    if manifest is not None:
        facts |= _manifest_facts(manifest, tensors)
    facts = {name: value for name, value in facts.items() if value is not None}
    inspection = Inspection(kind, source.reference, facts, totals)
    try:
        plan = _plan(tensors, config, manifest, options)
    except PlanError as error:
        return replace(inspection, problem=str(error))
    inspection = replace(
        inspection,
        plan=plan.tensors,
        unknown=tuple(tensor.name for tensor in plan.unknown),
        presumed=_DEFAULT_QUANTIZATION if quantization is None else None,
    )
    return _with_shares(inspection, plan.tensors, quantization or _DEFAULT_QUANTIZATION)


def _plan(
    tensors: Mapping[str, ModelTensor],
    config: dict[str, Any] | None,
    manifest: ModelManifest | None,
    options: InspectOptions,
) -> Plan:
    """The plan by which a model was masked, or the one by which it would be."""
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    if manifest is None or manifest.kind == "global-model":
        return make_plan(shapes, config, axis=options.axis or "neuron", overrides=_plan_rules(options))
    plan = make_plan(shapes, config, axis=manifest.axis, overrides=manifest.overrides)
    return replace(plan, tensors=tuple(_with_ratio(tensor, manifest.p1) for tensor in plan.tensors))


def _with_ratio(tensor: TensorPlan, p1: float) -> TensorPlan:
    return replace(tensor, p1=p1) if tensor.masked and tensor.p1 is None else tensor


def _manifest_facts(manifest: ModelManifest, tensors: Mapping[str, ModelTensor]) -> dict[str, Any]:
    facts = manifest.model_dump(
        mode="json", exclude={"format", "kind", "groups", "tensors", "overrides", "quantization", "merged"}
    )
    if manifest.merged is not None:
        facts["merged"] = len(manifest.merged)
    facts |= _placement(manifest.overrides)
    facts["quantization"] = manifest.quantization
    if manifest.p1 == 1:
        facts |= {"groups": len(manifest.groups), "hidden": 1.0, "meaning": _NOTHING_SENT}
    elif manifest.groups:
        hidden = sum(
            math.prod(tensor.shape) * manifest.groups[units.groups[0]].hidden / manifest.groups[units.groups[0]].units
            for name, tensor in tensors.items()
            if (units := manifest.tensors.get(name)) is not None
        )
        facts["groups"] = len(manifest.groups)
        name = "hidden" if manifest.kind == "server-model" else "hidden_by_server"
        facts[name] = hidden / max(1, _parameters(tensors.values()))
    return facts


def _with_shares(inspection: Inspection, rows: Sequence[TensorPlan], quantization: Quantization | None) -> Inspection:
    clear = [row for row in rows if not row.masked and not (row.quantized and quantization is not None)]
    return replace(
        inspection, shares=clear_shares(rows, quantization), clear=_by_layer(clear, max(1, _parameters(rows)))
    )


def _by_layer(rows: Iterable[TensorPlan], total: int) -> tuple[ClearTensors, ...]:
    """Tensors, those that differ only in layer numbers counted together; the largest first."""
    sizes: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        sizes.setdefault((_LAYER_NUMBER.sub("*", row.name), row.role), []).append(math.prod(row.shape))
    listed = [ClearTensors(*key, len(alike), sum(alike), sum(alike) / total) for key, alike in sizes.items()]
    return tuple(sorted(listed, key=lambda tensors: (-tensors.parameters, tensors.name)))


class _Tensor(Protocol):
    """What tensors of headers, models and plans have in common."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def _parameters(tensors: Iterable[_Tensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


def _dtypes(tensors: Iterable[_Tensor]) -> tuple[str, ...]:
    return tuple(sorted({tensor.dtype for tensor in tensors}))
