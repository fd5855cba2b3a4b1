"""`export_proxy`: from the owner's model to what one client, or many, may have.

    plan ─▶ server mask ─▶ quantize ─▶ client mask ─▶ proxy/ ─▶ ledger line ─▶ publish (─▶ push)

The ledger line is on disk before the proxy appears, so no proxy is ever out without one; the proxy id depends on
nothing but key, model and options, so a repeated export is the same release and adds no line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedqsn_cli.artifacts import ledger as ledgers
from fedqsn_cli.artifacts.ledger import Release
from fedqsn_cli.artifacts.manifests import PROXY_MANIFEST, Quantization, TrainsFill, file_digest, manifest_bytes
from fedqsn_cli.artifacts.proxy_folder import write_visible
from fedqsn_cli.checkpoint import ArtifactWriter, FolderWriter, WriterThreads, allow_open_files, check_reference
from fedqsn_cli.checkpoint import push as push_to_hub
from fedqsn_cli.checkpoint.descriptors import MAX_OPEN_FILES
from fedqsn_cli.checkpoint.files import keep_outside
from fedqsn_cli.crypto.optional import signer
from fedqsn_cli.errors import InputError, OutputExists
from fedqsn_cli.export.advice import (
    check_settings,
    refuse_untrainable,
    tell_of_second_proxies,
    tell_of_unusual_companions,
    tell_what_stays,
)
from fedqsn_cli.export.companions import write_public_companions
from fedqsn_cli.export.outputs import METADATA, client_output, tensor_specs
from fedqsn_cli.export.pipeline import run
from fedqsn_cli.export.records import ProxyRecord
from fedqsn_cli.export.session import MaskingSession, open_session
from fedqsn_cli.exposure.budget import Budget, Planned
from fedqsn_cli.kernels.digests import Algorithm, algorithm_of
from fedqsn_cli.masks.job_masks import ClientMasks
from fedqsn_cli.models.tensor_task import TensorTask
from fedqsn_cli.options import ExportOptions, QuantizationOptions
from fedqsn_cli.progress import SILENT, Progress
from fedqsn_cli.quantization import layout

CLIENTS_A_PASS = 128
"""So many proxies are written from one read of the model. More are written in turns: memory stays the same."""
SMALL_FILES = 8  # that are open for a moment: the key, the ledger, a manifest


@dataclass(frozen=True, slots=True)
class ExportedProxy:
    """One proxy that was released.

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
        public_base: how many masked tensors of it are exact, resized and so on (see `models.public_base`); None for
            zero fill.
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
    ledger = Path(options.ledger)
    for target in options.targets:
        keep_outside(target, key=options.key, ledger=ledger, sign=options.sign)
    for repository in options.repositories:
        check_reference(repository)
    sign = signer(options.sign)
    session = open_session(source, options)
    untrainable = refuse_untrainable(session.model, options.allow_untrainable)
    past = ledgers.read_if_there(ledger, None if options.trust_records else session.job)
    train = _trained_fill(session, options)
    masks = [session.client_masks(client, options) for client in options.client]
    budget = _budget(session, masks, options)
    of_job = [release for release in past if release.job == session.job.commitment]
    check_settings(options, of_job)
    budget.check(past)
    quantization = choose_quantization(session, options)
    export = ProxyExport.of(session, quantization, train, options.max_shard_bytes)
    together = _proxies_a_pass(session, options)
    with _writers(options, together) as writers:
        algorithm = algorithm_of(of_job[-1].model_digest if of_job else None)  # a job keeps its own
        releases = export.write(writers, masks, algorithm, progress, together=together)
        published = _published_before(options, writers)
        tell_what_stays(session.model, progress)
        tell_of_unusual_companions(session.model, progress)
        if untrainable is not None:
            progress.note(f"no client can train a proxy of this model: {untrainable}")
        tell_of_second_proxies(of_job, releases, progress)
        sign(writers)
        session.save_key()
        # the budget is checked again: others may have released meanwhile
        ledgers.record(ledger, session.job, releases, check=budget.check, trust=options.trust_records)
        folders = [writer.out if writer.out in published else writer.publish() for writer in writers]
    commits: list[str | None] = [None] * len(folders)
    if options.push:
        commits = [push_to_hub(folder, to) for folder, to in zip(folders, options.repositories, strict=True)]
    proxies = map(_exported, releases, folders, commits)
    return _result(export, masks[0], releases[0].model_digest, tuple(proxies))


def _trained_fill(session: MaskingSession, options: ExportOptions) -> TrainsFill:
    """What clients train besides visible units, as manifests and ledger hold it. Raises InputError."""
    if options.train != "all":
        if session.job.sends_nothing:
            raise InputError(
                "with --p1 1 no neuron of the model is visible, so nothing would be trained",
                where="--train",
                hint="use --train all",
            )
        return None
    if session.fill != "base":
        raise InputError(
            "without a public base there is nothing in the holes to train", where="--train all", hint="use --fill base"
        )
    return "all"


def _budget(session: MaskingSession, masks: Sequence[ClientMasks], options: ExportOptions) -> Budget:
    """What clients may have seen once these releases are made."""
    planned = tuple(Planned(mask.client, mask.round, mask.schedule, mask.p2) for mask in masks)
    return Budget(session.job, planned, options.budget, options.coalition)


def choose_quantization(session: MaskingSession, options: QuantizationOptions) -> Quantization | None:
    """The quantization of the output: the source's if it is quantized, else what was asked, else nf4 in blocks of 64.

    Raises:
        InputError: the source is quantized in another way than asked.
    """
    stored = session.stored_quantization
    if stored is None:
        chosen = layout.quantization(
            options.format or "nf4",
            block_size=options.block_size or 64,
            double_quant=bool(options.double_quant),
            layout=options.layout,
        )
    else:
        chosen = stored
        for name in ("format", "block_size", "double_quant", "layout"):
            asked, held = getattr(options, name), getattr(stored, name)
            if asked is not None and asked != held:
                what = f"the model is quantized with {name.replace('_', ' ')} {held}, but {asked} was asked for"
                raise InputError(what, where=f"--{name.replace('_', '-')}")
    if session.fill == "base" and chosen is not None and chosen.double_quant:
        raise InputError("double quantization cannot be used with --fill base", where="--double-quant")
    return chosen


def _proxies_a_pass(session: MaskingSession, options: ExportOptions) -> int:
    """How many proxies one pass over the model writes, as far as the limit of open files allows.

    The folder of every client stays open until all are published, for its lock. A pass has two files open for each
    proxy that it writes, besides what it reads.

    Raises:
        InputError: not even one at a time can be written.
    """
    clients, most = len(options.client), min(len(options.client), CLIENTS_A_PASS)
    shards = len({entry.file for entry in session.model.checkpoint.entries.values()})
    inputs = SMALL_FILES + min(MAX_OPEN_FILES, 2 * shards * (1 if session.base is None else 2))
    left = allow_open_files(clients + 2 * most + inputs) - clients - inputs
    if left < 2:
        needed = clients + 2 + inputs
        raise InputError(
            f"{clients} proxies need {needed} open files, and this process may open {left + clients + inputs} more",
            where="--client",
            hint="raise the limit (ulimit -n), or export fewer clients at a time",
        )
    return min(most, left // 2)


@contextmanager
def _writers(options: ExportOptions, together: int) -> Iterator[list[ArtifactWriter]]:
    """A writer for each client; what is not published when this ends is removed.

    Args:
        together: how many of them are filled at the same time.
    """
    with ExitStack() as stack:
        threads = WriterThreads(together)
        stack.callback(threads.stop)
        yield [
            stack.enter_context(
                ArtifactWriter(target, force=force, replaces=[PROXY_MANIFEST], pipeline=threads, uniform=True)
            )
            for target, force in zip(options.targets, _replaceable(options), strict=True)
        ]


def _replaceable(options: ExportOptions) -> list[bool]:
    """Which targets may be there already: with --force all; else proxies among targets of which others are missing.

    So it is after a kill while several proxies were published. The same export run again completes them.
    """
    there = [(target / PROXY_MANIFEST).is_file() and not target.is_symlink() for target in options.targets]
    return [options.force or (found and not all(there)) for found in there]


def _published_before(options: ExportOptions, writers: Sequence[ArtifactWriter]) -> set[Path]:
    """The targets that hold their proxy already, byte for byte. Raises OutputExists for one that holds another."""
    published = set()
    for writer in writers if not options.force else ():
        if os.path.lexists(writer.out):
            if file_digest(writer.out / PROXY_MANIFEST) != writer.digests[PROXY_MANIFEST]:
                hint = "choose another path, or replace it with --force"
                raise OutputExists("already exists, and is another proxy", where=writer.out, hint=hint)
            published.add(writer.out)
    return published


@dataclass(frozen=True, slots=True)
class ProxyExport:
    """What the proxies of several clients have in common: all that decides their bytes, but the masks.

    Args:
        train: what clients train besides visible units. max_shard_bytes: largest sum of tensor bytes in one file.
    """

    session: MaskingSession
    quantization: Quantization | None
    tasks: Sequence[TensorTask]
    train: TrainsFill
    max_shard_bytes: int

    @classmethod
    def of(
        cls, session: MaskingSession, quantization: Quantization | None, train: TrainsFill, max_shard_bytes: int
    ) -> ProxyExport:
        """The export of a session's model."""
        return cls(session, quantization, session.tasks(quantization), train, max_shard_bytes)

    def write(
        self,
        writers: Sequence[FolderWriter],
        masks: Sequence[ClientMasks],
        algorithm: Algorithm,
        progress: Progress,
        *,
        together: int = CLIENTS_A_PASS,
    ) -> list[Release]:
        """Write all proxies, `together` of them in one pass over the model. Returns their ledger lines.

        Args:
            algorithm: of the digest of the model.
        """
        specs = tensor_specs(self.tasks, self.quantization)
        releases = []
        for first in range(0, len(masks), together):
            part = slice(first, first + together)
            sinks = [
                writer.tensors("model", specs, max_shard_bytes=self.max_shard_bytes, metadata=METADATA)
                for writer in writers[part]
            ]
            outputs = [
                client_output(sink, self.quantization, mask) for sink, mask in zip(sinks, masks[part], strict=True)
            ]
            digests = run(
                self.session.model,
                self.tasks,
                self.quantization,
                outputs,
                base=self.session.base,
                algorithm=algorithm,
                progress=progress,
            )
            record = ProxyRecord(self.session, self.quantization, self.train, self.max_shard_bytes, digests)
            for writer, sink, mask in zip(writers[part], sinks, masks[part], strict=True):
                sink.close()
                releases.append(self._finish(writer, mask, record))
        return releases

    def _finish(self, writer: FolderWriter, masks: ClientMasks, record: ProxyRecord) -> Release:
        """Write everything but the model's tensors, proxy.json last."""
        write_public_companions(self.session.model, writer, self.quantization)
        write_visible(writer, self.session.model.plan.groups(), masks.visible_group)
        manifest = record.manifest(masks, writer.digests)
        writer.add_bytes(PROXY_MANIFEST, manifest_bytes(manifest))
        return record.release(masks, manifest.proxy_id, writer.digests[PROXY_MANIFEST])


def _exported(release: Release, folder: Path, commit: str | None) -> ExportedProxy:
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    return ExportedProxy(release.client, str(folder), release.proxy_id, size, commit)


def _result(export: ProxyExport, masks: ClientMasks, digest: str, proxies: tuple[ExportedProxy, ...]) -> ExportResult:
    session, tensors = export.session, [task.plan for task in export.tasks]
    total = sum(task.size for task in export.tasks)
    by_server = sum(map(session.masks.hidden_elements, tensors))
    by_client = sum(map(masks.hidden_elements, tensors))
    return ExportResult(
        proxies=proxies,
        round=masks.round,
        model_digest=digest,
        quantization=export.quantization,
        hidden_by_server=by_server / total,
        hidden_from_client=(by_server + by_client) / total,
        shares=layout.clear_shares(tensors, export.quantization),
        key_created=session.new_key,
        public_base=session.base.counts() if session.base is not None else None,
    )
