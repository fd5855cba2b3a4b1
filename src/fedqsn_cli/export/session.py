"""What the owner's commands share: a model opened with its job, its base and its options, which must agree."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedqsn_cli.artifacts.manifests import (
    Fill,
    GroupCount,
    ModelManifest,
    PublicBaseRecord,
    Quantization,
    SourceRecord,
    Units,
)
from fedqsn_cli.errors import InputError, KeyFileError
from fedqsn_cli.masks import job_key
from fedqsn_cli.masks.job_key import JobKey
from fedqsn_cli.masks.job_masks import ServerMasks
from fedqsn_cli.models.duplicates import refuse_duplicate_tensors
from fedqsn_cli.models.model import OpenModel, open_model
from fedqsn_cli.models.public_base import PublicBase, open_base
from fedqsn_cli.options import MaskingOptions
from fedqsn_cli.planning.overrides import canonical, load_overrides
from fedqsn_cli.planning.placement import FIELDS, OPTIONS, describe, parse_placement
from fedqsn_cli.planning.tensor_plan import TensorPlan

METADATA = {"format": "pt"}


@dataclass(frozen=True)
class MaskingSession:
    """A model that is about to be masked: opened, planned, and bound to its job.

    Args:
        model: the global, server or quantized server model.
        job: key, p1 and plan; new_key says that it is not on disk yet.
        fill: what stands in a hole. base: the public base for fill "base".
        rescale: whether the visible part is scaled by n / |V|; never with a public base.
    """

    model: OpenModel
    job: JobKey
    key: Path
    new_key: bool
    masks: ServerMasks
    fill: Fill
    base: PublicBase | None
    rescale: bool

    def save_key(self) -> None:
        """Put a new key on disk; an old one stays as it is."""
        if self.new_key:
            job_key.save(self.key, self.job)


def open_session(source: str | Path, options: MaskingOptions) -> MaskingSession:
    """Open a model for masking, with the job that its key belongs to.

    An option that is None was not given: then the key or the model's manifest decides, and where there is neither, the
    defaults (axis neuron, rescale, zero fill).

    Raises:
        InputError: options, key, manifest and model do not go together.
    """
    key, plan, axis = Path(options.key), options.plan_file, options.axis
    placement = parse_placement(options.where, options.layers, options.p1_schedule)
    known = job_key.load(key) if os.path.lexists(key) else None
    overrides = _overrides(known, key, plan, placement)
    model = open_model(str(source), axis=axis or (known.axis if known else "neuron"), overrides=overrides)
    model.plan.require_known()
    if not any(tensor.masked for tensor in model.plan.tensors):
        raise InputError("the plan masks no tensor", where=source, hint="see 'fedqsn inspect --show-plan'")
    server = model.manifest if model.kind == "server-model" else None
    if model.kind == "masked-model":
        raise InputError("this model carries a client mask already", where=source, hint="give the server model")
    if model.is_quantized and server is None:
        raise InputError("this model was quantized before it was masked", where=source, hint="mask it first")
    if server is None:
        refuse_duplicate_tensors(model.checkpoint, model.plan)
    elif known is None:
        raise KeyFileError("there is no key", where=key, hint="a server model needs the key it was masked with")
    if server is not None:
        _agreed("--axis", axis, server.axis, None)
        _agreed("--plan-file", overrides if plan is not None else None, server.overrides, None)
    job, new = job_key.open_or_draw(key, p1=options.p1, axis=model.plan.axis, plan=model.plan)
    chosen = _agreed("--fill", options.fill, server.fill if server else None, "zero")
    scaled = _agreed("--rescale", options.rescale, server.rescale if server and server.fill == "zero" else None, True)
    if server is not None and server.job != job.commitment:
        raise KeyFileError("the key belongs to another job than this server model", where=key)
    base = _open_base(model, chosen, options.public_base)
    return MaskingSession(model, job, key, new, ServerMasks(job), chosen, base, scaled and chosen == "zero")


def _overrides(
    known: JobKey | None, key: Path, plan: str | Path | None, asked: dict[str, Any]
) -> dict[str, Any] | None:
    """The plan's rules, and where and how much to hide: as asked, as the plan file says, and as the job has it.

    Raises:
        InputError: the three contradict each other. KeyFileError: the job has it otherwise.
    """
    written = load_overrides(plan) if plan is not None else {}
    for name, value in asked.items():
        if name in written and value != written[name]:
            raise InputError(
                f"the plan file says {describe(name, written[name])}, asked was {value}", where=OPTIONS[name]
            )
    wanted = {name: written[name] for name in FIELDS if name in written} | asked
    if known is not None:
        job_key.check_placement(known, wanted, key)
    if known is None and plan is None and not asked:
        return None
    held = known.overrides if known is not None else {"rule": []}
    return canonical({**held, **wanted, "rule": written.get("rule", held["rule"])})


def keep_outside(out: Path, **files: str | Path | None) -> None:
    """Refuse a key or ledger inside of an output: it would leave with it, or be lost when --force replaces it.

    Args:
        out: the directory to make. files: paths by the option that gives them.

    Raises:
        InputError: one of them lies in there.
    """
    for option, file in files.items():
        if file is not None and Path(os.path.realpath(file)).is_relative_to(os.path.realpath(out)):
            raise InputError("lies inside of the output", where=f"--{option}", hint="keep it beside the outputs")


def _agreed(option: str, asked: Any, recorded: Any, default: Any) -> Any:
    """The value of an option: what was asked, which must be what the manifest says, which stands before the default."""
    if asked is not None and recorded is not None and asked != recorded:
        raise InputError(f"the model was made with {recorded}, asked was {asked}", where=option)
    return next((value for value in (asked, recorded) if value is not None), default)


def _open_base(model: OpenModel, fill: Fill, reference: str | Path | None) -> PublicBase | None:
    if fill == "zero":
        if reference is not None:
            raise InputError("a public base is only used with --fill base", where="--public-base")
        return None
    if reference is None:
        raise InputError("--fill base needs the public base", where="--public-base")
    return open_base(str(reference), model)


def model_manifest(
    session: MaskingSession, kind: str, digest: str, base_digest: str | None, how: Quantization | None
) -> ModelManifest:
    """`fedqsn.json` of a model that was masked."""
    model, plan = session.model, session.model.plan
    base = public_base(session, base_digest)
    return ModelManifest.model_validate(
        {
            "kind": kind,
            "job": session.job.commitment,
            "p1": session.job.p1,
            "axis": plan.axis,
            "rescale": session.rescale,
            "fill": session.fill,
            "public_base": base,
            "plan": plan.digest,
            "overrides": plan.overrides,
            "model_digest": digest,
            "quantization": how,
            "groups": group_counts(plan.groups(), session.job),
            "tensors": unit_table(plan.tensors),
            "source": source_record(model),
            "trained_fill": True if model.has_trained_fill else None,
        }
    )


def public_base(session: MaskingSession, digest: str | None) -> PublicBaseRecord | None:
    """The record of the public base: a hub reference with its commit, never a local path.

    Raises:
        InputError: it is not the one that the server model was filled with.
    """
    if session.base is None or digest is None:
        return None
    recorded = session.model.manifest.public_base if session.model.manifest else None
    if recorded is not None and recorded.sha256 != digest:
        raise InputError("not the public base that the server model was filled with", where="--public-base")
    source = session.base.source
    reference = f"{source.reference.split('@')[0]}@{source.revision}" if source.revision is not None else None
    return recorded or PublicBaseRecord(reference=reference, sha256=digest)


def group_counts(groups: Mapping[str, int], job: JobKey) -> dict[str, GroupCount]:
    """How many units each group has and how many the server mask hides."""
    return {name: GroupCount(units=n, hidden=job.hides(name, n)) for name, n in groups.items()}


def unit_table(tensors: tuple[TensorPlan, ...]) -> dict[str, Units]:
    """Where the units of each masked tensor lie."""
    return {t.name: Units(groups=t.groups, axis=t.axis, view=t.view) for t in tensors if t.axis is not None}


def source_record(model: OpenModel) -> SourceRecord:
    """Where the model came from, for the private manifest."""
    return SourceRecord(reference=model.source.reference, revision=model.source.revision)


def visible_bits(flags: np.ndarray[Any, np.dtype[np.bool_]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """One bit a unit, the first unit in the highest bit of the first byte: [ceil(n / 8)]."""
    return np.packbits(flags)
