"""What the owner's commands share: a model opened with its job, its public base and its options, which must agree."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fedqsn_cli.artifacts.manifests import Fill, Quantization
from fedqsn_cli.errors import InputError, KeyFileError
from fedqsn_cli.masks import job_key
from fedqsn_cli.masks.job_key import JobKey
from fedqsn_cli.masks.job_masks import ClientMasks, ServerMasks
from fedqsn_cli.models.duplicates import refuse_duplicate_tensors
from fedqsn_cli.models.model import OpenModel, open_model
from fedqsn_cli.models.plan_file import load_overrides
from fedqsn_cli.models.public_base import PublicBase, open_base
from fedqsn_cli.models.tensor_task import TensorTask, tensor_tasks
from fedqsn_cli.options import ExportOptions, MaskingOptions, MaskOptions
from fedqsn_cli.planning.overrides import canonical
from fedqsn_cli.planning.placement import FIELDS, OPTIONS, describe, parse_placement

Value = TypeVar("Value")


@dataclass(frozen=True)
class MaskingSession:
    """A model that is about to be masked: opened, planned, and bound to its job.

    Args:
        model: the global, server or quantized server model.
        job: key, p1 and plan. new_key: it is not on disk yet.
        fill: what hidden units are replaced by. base: the public base of fill "base".
        rescale: whether the visible part is scaled by n / |V|; never with a public base.
        trust_records: whether a key file without a seal is taken, and sealed.
    """

    model: OpenModel
    job: JobKey
    key: Path
    new_key: bool
    masks: ServerMasks
    fill: Fill
    base: PublicBase | None
    rescale: bool
    trust_records: bool = False

    @property
    def stored_quantization(self) -> Quantization | None:
        """How the model is quantized already; None if it is not."""
        return self.model.manifest.quantization if self.model.manifest else None

    def client_masks(self, client: str, options: MaskOptions | ExportOptions) -> ClientMasks:
        """The masks of one client, on top of the server's."""
        round, p2, schedule = options.round or 0, options.p2 or 0.0, options.schedule or "fresh"
        return ClientMasks(self.masks, client, round, p2, schedule, self.rescale)

    def tasks(self, quantization: Quantization | None) -> list[TensorTask]:
        """The tensors of the model, for a pass over it."""
        return tensor_tasks(self.model, quantization, self.masks.hidden_on_the_way)

    def save_key(self) -> None:
        """Write a new key to disk. An old one stays as it is, or is sealed if records are to be trusted."""
        if self.new_key:
            job_key.save(self.key, self.job)
        elif self.trust_records:
            job_key.seal_file(self.key, self.job)


def open_session(source: str | Path, options: MaskingOptions) -> MaskingSession:
    """Open a model for masking, with the job that its key belongs to.

    An option that is None was not given: the key or the model's manifest decides then, and where there is neither, the
    defaults do (axis neuron, rescale, zero fill).

    Raises:
        InputError: options, key, manifest and model do not agree.
    """
    key = Path(options.key)
    known = job_key.load(key, unsealed=options.trust_records) if os.path.lexists(key) else None
    overrides = _overrides(options, known)
    model = open_model(str(source), axis=options.axis or (known.axis if known else "neuron"), overrides=overrides)
    _check_maskable(model, source)
    server = model.manifest if model.kind == "server-model" else None
    if server is None:
        refuse_duplicate_tensors(model.checkpoint, model.plan)
    elif known is None:
        raise KeyFileError("there is no key", where=key, hint="a server model needs the key it was masked with")
    else:
        _reconcile("--axis", options.axis, server.axis)
        _reconcile("--plan-file", overrides if options.plan_file is not None else None, server.overrides)
    job, new_key = job_key.open_or_draw(
        key, p1=options.p1, axis=model.plan.axis, plan=model.plan, unsealed=options.trust_records
    )
    fill: Fill = _reconcile("--fill", options.fill, server.fill if server else None) or "zero"
    recorded = server.rescale if server is not None and server.fill == "zero" else None
    rescale = _reconcile("--rescale", options.rescale, recorded) is not False
    if server is not None and server.job != job.commitment:
        raise KeyFileError("the key belongs to another job than this server model", where=key)
    if server is not None and server.p1 != job.p1:
        what = f"its fedqsn.json says p1 = {server.p1!r}, and the key p1 = {job.p1!r}"
        raise InputError(what, where=source, hint="mask the global model again")
    if job.sends_nothing:
        _check_sends_nothing(model, fill)
    base = _open_base(model, fill, options.public_base, whole=job.sends_nothing)
    masks, scaled = ServerMasks(job), rescale and fill == "zero"
    return MaskingSession(model, job, key, new_key, masks, fill, base, scaled, options.trust_records)


def _check_maskable(model: OpenModel, source: str | Path) -> None:
    """Refuse models that are further than a server model, or that have nothing to mask. Raises InputError."""
    model.plan.require_known()
    if not any(tensor.masked for tensor in model.plan.tensors):
        raise InputError("the plan masks no tensor", where=source, hint="see 'fedqsn inspect --show-plan'")
    if model.kind == "masked-model":
        raise InputError("this model carries a client mask already", where=source, hint="give the server model")
    if model.is_quantized and model.kind != "server-model":
        raise InputError("this model was quantized before it was masked", where=source, hint="mask it first")


def _overrides(options: MaskingOptions, known: JobKey | None) -> dict[str, Any] | None:
    """The plan's rules, and where and how much to hide: from the options, the plan file and the job.

    Raises:
        InputError: options and plan file contradict each other. KeyFileError: the job has it otherwise.
    """
    asked = parse_placement(options.where, options.layers, options.p1_schedule)
    written = load_overrides(options.plan_file) if options.plan_file is not None else {}
    for name, value in asked.items():
        if name in written and value != written[name]:
            raise InputError(
                f"the plan file says {describe(name, written[name])}, but {value} was asked for", where=OPTIONS[name]
            )
    wanted = {name: written[name] for name in FIELDS if name in written} | asked
    if known is not None:
        job_key.check_placement(known, wanted, options.key)
    elif not written and not asked:
        return None
    held = known.overrides if known is not None else {"rule": []}
    return canonical({**held, **wanted, "rule": written.get("rule", held["rule"])})


def _reconcile(option: str, asked: Value | None, recorded: Value | None) -> Value | None:
    """The value of an option that the model's manifest may hold, too. Raises InputError if the two differ."""
    if asked is not None and recorded is not None and asked != recorded:
        raise InputError(f"the model was made with {recorded}, but {asked} was asked for", where=option)
    return recorded if asked is None else asked


def _check_sends_nothing(model: OpenModel, fill: Fill) -> None:
    """p1 = 1 hides all of the model: something else must take its place, and no rule may show a part. Raises."""
    if fill != "base":
        hint = "fill the model with a public one: --fill base --public-base BASE"
        raise InputError("hides the whole model, and leaves nothing to train", where="--p1 1", hint=hint)
    shown = [name for name in FIELDS if model.plan.overrides.get(name) not in (None, "all")]
    if shown or any(tensor.cleared for tensor in model.plan.tensors):
        what = f"hides the whole model, but {OPTIONS[shown[0]] if shown else 'the plan file'} shows a part of it"
        raise InputError(what, where="--p1 1", hint="leave it out, or choose a smaller --p1")


def _open_base(model: OpenModel, fill: Fill, reference: str | Path | None, *, whole: bool) -> PublicBase | None:
    if fill == "zero":
        if reference is not None:
            raise InputError("a public base is only used with --fill base", where="--public-base")
        return None
    if reference is None:
        raise InputError("--fill base needs the public base", where="--public-base")
    return open_base(str(reference), model, whole=whole)
