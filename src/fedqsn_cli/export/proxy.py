"""`export_proxy`: from the owner's model to what one client, or many, may have.

    plan ─▶ server mask ─▶ quantize ─▶ client mask ─▶ proxy/ ─▶ ledger line ─▶ publish (─▶ push)

The ledger line is on disk before the proxy appears, so no proxy is ever out without one; the proxy id depends on
nothing but key, model and options, so a repeated export is the same release and adds no line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedqsn_cli import strictjson
from fedqsn_cli.artifacts import ledger as ledgers
from fedqsn_cli.artifacts.ledger import Release
from fedqsn_cli.artifacts.manifests import (
    PROXY_MANIFEST,
    GroupUnits,
    ProxyManifest,
    PublicBaseRecord,
    Quantization,
    TrainsFill,
    manifest_bytes,
)
from fedqsn_cli.artifacts.sanitize import public_companion, public_config
from fedqsn_cli.checkpoint import ArtifactWriter, TensorSpec, WriterThreads, allow_open_files
from fedqsn_cli.checkpoint import push as push_to_hub
from fedqsn_cli.errors import InputError
from fedqsn_cli.export.outputs import ClientOutput, tensor_specs
from fedqsn_cli.export.pipeline import Digests, run
from fedqsn_cli.export.session import (
    METADATA,
    MaskingSession,
    keep_outside,
    open_session,
    public_base,
    unit_table,
    visible_bits,
)
from fedqsn_cli.exposure.budget import Budget, Planned
from fedqsn_cli.masks.draw import LABEL, derive
from fedqsn_cli.masks.job_masks import ClientMasks
from fedqsn_cli.models.tensor_task import TensorTask, tensor_tasks
from fedqsn_cli.options import ExportOptions, QuantizationOptions, Train
from fedqsn_cli.progress import SILENT, Progress
from fedqsn_cli.quantization.bnb_format import quantization_config
from fedqsn_cli.quantization.layout import clear_shares, quantization

CLIENTS_A_PASS = 128
"""So many proxies are written from one read of the model. More are written in turns: memory stays the same."""


@dataclass(frozen=True, slots=True)
class ExportedProxy:
    """One proxy that is out.

    Args:
        bytes: size of all its files together.
        pushed: the hub commit it was pushed as, or None.
    """

    client: str
    path: str
    proxy_id: str
    bytes: int
    pushed: str | None


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What `export_proxy` made.

    Args:
        hidden_by_server: share of all parameters that the server mask hides (never transmitted).
        hidden_from_client: share of all parameters that a proxy does not show, server and client mask together.
        shares: share of all parameters shipped masked and quantized, masked only, quantized only, in the clear.
        key_created: a new job key was written.
        public_base: how many masked tensors of it are exact, resized and so on (see `bases`); None for zero fill.
    """

    proxies: tuple[ExportedProxy, ...]
    round: int
    model_digest: str
    quantization: Quantization | None
    hidden_by_server: float
    hidden_from_client: float
    shares: dict[str, float]
    key_created: bool
    public_base: dict[str, int] | None = None


def export_proxy(source: str | Path, options: ExportOptions, *, progress: Progress = SILENT) -> ExportResult:
    """Write the proxy of each client: P = s · M_C ⊙ Q(M_H ⊙ W) (FedQSN, arXiv 2508.18911).

    Args:
        source: global model, server model or quantized server model; all three give the same bytes.
        options: see `ExportOptions`.
        progress: told of bytes.

    Raises:
        InputError: anything does not fit together; nothing was written then.
        GateFailed: a client or coalition would have seen more than the budget; nothing was written then.

    Example:
        >>> export_proxy("global/", "proxy/", client="alice", round=1, key="job.key", ledger="ledger.jsonl", p2=0.1)
    """
    clients, targets, ledger = options.client, options.targets, Path(options.ledger)
    round, p2, schedule, push = options.round, options.p2, options.schedule or "fresh", options.push
    for target in targets:
        keep_outside(target, key=options.key, ledger=ledger)
    ledgers.check(ledger)
    session = open_session(source, options)
    train = options.train or "visible"
    _check_train(train, session)
    planned = tuple(Planned(name, round, schedule, p2) for name in clients)
    allowance = Budget(session.job, planned, options.budget, options.coalition)
    allowance.check_ledger(ledger)
    how = chosen_quantization(session, options)
    tasks = tensor_tasks(session.model, how, session.masks.hidden)
    masks = [ClientMasks(session.masks, name, round, p2, schedule, session.rescale) for name in clients]
    with ExitStack() as stack:
        together = min(len(clients), CLIENTS_A_PASS)
        allow_open_files(len(clients) + 2 * together)
        pipeline = WriterThreads(together)
        stack.callback(pipeline.stop)
        writers = [
            stack.enter_context(ArtifactWriter(target, force=options.force, pipeline=pipeline)) for target in targets
        ]
        specs, limit = tensor_specs(tasks, how), options.max_shard_bytes
        releases = []
        for first in range(0, len(clients), together):
            some = list(zip(writers, masks, strict=True))[first : first + together]
            sinks = [writer.tensors("model", specs, max_shard_bytes=limit, metadata=METADATA) for writer, _ in some]
            outputs = [
                ClientOutput(sink, how, mask.hidden, mask.factor) for sink, (_, mask) in zip(sinks, some, strict=True)
            ]
            digests = run(session.model, tasks, how, outputs, base=session.base, progress=progress)
            for sink, (writer, mask) in zip(sinks, some, strict=True):
                sink.close()
                releases.append(_complete(writer, session, mask, how, digests, _written(train)))
        session.save_key()
        ledgers.record(ledger, releases, check=allowance.check)  # again: others may have released meanwhile
        published = [writer.publish() for writer in writers]
    pushed = [
        push_to_hub(path, push.replace("{client}", name)) if push else None
        for path, name in zip(published, clients, strict=True)
    ]
    return _result(session, masks[0], tasks, how, digests, releases, published, pushed)


def chosen_quantization(session: MaskingSession, options: QuantizationOptions) -> Quantization | None:
    """The quantization of the output: the source's if it is quantized, else what was asked, else nf4 in blocks of 64.

    Raises:
        InputError: the source is quantized in another way than asked.
    """
    old = session.model.manifest.quantization if session.model.manifest else None
    if old is None:
        how = quantization(
            options.format or "nf4",
            block_size=options.block_size or 64,
            double_quant=bool(options.double_quant),
            layout=options.layout,
        )
    else:
        for option in ("format", "block_size", "double_quant", "layout"):
            value = getattr(options, option)
            if value is not None and value != getattr(old, option):
                raise InputError(
                    f"the model is quantized with {option.replace('_', ' ')} {getattr(old, option)}, asked was {value}",
                    where=f"--{option.replace('_', '-')}",
                )
        how = old
    if session.fill == "base" and how is not None and how.double_quant:
        raise InputError("double quantization cannot be used with --fill base", where="--double-quant")
    return how


def _check_train(train: str, session: MaskingSession) -> None:
    """Refuse a way to train that is none, or that does not go with the work. Raises InputError."""
    if train == "all" and session.fill != "base":
        raise InputError(
            "without a public base there is nothing in the holes to train", where="--train all", hint="use --fill base"
        )


def _written(train: Train) -> TrainsFill:
    """The way to train as manifests and ledger hold it."""
    return "all" if train == "all" else None


def _complete(
    writer: ArtifactWriter,
    session: MaskingSession,
    mask: ClientMasks,
    how: Quantization | None,
    digests: Digests,
    train: TrainsFill,
) -> Release:
    """Write everything but the model's tensors, proxy.json last; returns the ledger line."""
    write_companions(writer, session, how)
    _write_visible(writer, session, mask)
    base = public_base(session, digests.base)
    manifest = ProxyManifest(
        proxy_id=_proxy_id(session, mask, how, digests, base, train),
        job=session.job.commitment,
        round=mask.round,
        quantization=how,
        fill=session.fill,
        public_base=base,
        rescale=session.rescale,
        groups={name: GroupUnits(units=n) for name, n in session.model.plan.groups().items()},
        tensors=unit_table(session.model.plan.tensors),
        train=train,
        files=writer.digests,
    )
    data = manifest_bytes(manifest)
    writer.add_bytes(PROXY_MANIFEST, data)
    return Release(
        client=mask.client,
        round=mask.round,
        schedule=mask.schedule,
        proxy_id=manifest.proxy_id,
        proxy_sha256=hashlib.sha256(data).hexdigest(),
        p1=session.job.p1,
        p1_least=session.job.least_ratio,
        p2=mask.p2,
        rescale=session.rescale,
        fill=session.fill,
        train=train,
        quantization=how,
        plan=session.model.plan.digest,
        model_digest=digests.model,
        job=session.job.commitment,
    )


def write_companions(writer: ArtifactWriter, session: MaskingSession, how: Quantization | None) -> None:
    """config.json, tokenizer and generation files, without anything private."""
    model = session.model
    packed = None
    if how is not None and how.layout == "bnb":
        skip = model.plan.skip_modules(model.checkpoint.config)
        packed = quantization_config(how.format, how.block_size, how.double_quant, skip, model.config_dtype)
    if model.checkpoint.config is not None:
        writer.add_bytes("config.json", public_config(model.checkpoint.config, packed))
    for companion in model.checkpoint.companions:
        writer.add_bytes(companion.name, public_companion(companion))


def _write_visible(writer: ArtifactWriter, session: MaskingSession, mask: ClientMasks) -> None:
    groups = sorted(session.model.plan.groups().items())
    specs = [TensorSpec(name, "U8", ((units + 7) // 8,)) for name, units in groups]
    sink = writer.tensors("visible", specs, max_shard_bytes=None, metadata={})
    for name, units in groups:
        sink.write(name, 0, visible_bits(mask.visible_group(name, units)))
    sink.close()


def _proxy_id(
    session: MaskingSession,
    mask: ClientMasks,
    how: Quantization | None,
    digests: Digests,
    base: PublicBaseRecord | None,
    train: TrainsFill,
) -> str:
    """HMAC(key, scope, model digest, options): unpredictable outside, equal when the same export is run again."""
    options: dict[str, Any] = {
        "p2": mask.p2,
        "schedule": mask.schedule,
        "rescale": session.rescale,
        "fill": session.fill,
        "public_base": base.sha256 if base else None,
        "quantization": how.model_dump() if how else None,
        "plan": session.model.plan.digest,
    }
    if train is not None:
        options["train"] = train
    fields = (LABEL, "proxy", mask.client, str(mask.round), digests.model, strictjson.dumps(options))
    return derive(session.job.key, fields).hex()


def _result(
    session: MaskingSession,
    mask: ClientMasks,
    tasks: Sequence[TensorTask],
    how: Quantization | None,
    digests: Digests,
    releases: Sequence[Release],
    published: Sequence[Path],
    pushed: Sequence[str | None],
) -> ExportResult:
    tensors = [task.plan for task in tasks]
    total = sum(task.size for task in tasks)
    by_server = sum(map(session.masks.hidden_elements, tensors))
    by_client = sum(map(mask.hidden_elements, tensors))
    proxies = tuple(
        ExportedProxy(release.client, str(path), release.proxy_id, folder_bytes(path), commit)
        for release, path, commit in zip(releases, published, pushed, strict=True)
    )
    return ExportResult(
        proxies=proxies,
        round=mask.round,
        model_digest=digests.model,
        quantization=how,
        hidden_by_server=by_server / total,
        hidden_from_client=(by_server + by_client) / total,
        shares=clear_shares(tensors, how),
        key_created=session.new_key,
        public_base=session.base.counts() if session.base is not None else None,
    )


def folder_bytes(folder: Path) -> int:
    """Bytes of all files right in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
