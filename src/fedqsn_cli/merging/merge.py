"""`merge`: weighted averaging of updates, unit by unit, one chunk of one tensor at a time.

    Δ_k = U_k / s_k                                   model coordinates
    Δ   = Σ n_k Δ_k / Σ n_k                           over the clients that saw the unit (normalize coverage)
                                                      or over all clients (normalize clients)
    W'  = W + η Δ                                     units that nobody saw keep their bits

FedAvg (arXiv 1602.05629) is the case without masks and quantization. Memory holds one chunk, its sum and a few chunks
read ahead, however many clients there are; only looking for η or λ needs the whole model in memory.

A control update is the owner's own: what training on the proxy does to the model on data that is not new to it. It is
taken off every client's Δ_k, times γ, on the units that it saw.

Where clients trained the fill, too (`export_proxy`, train all), their Δ_k hold every unit. In a server model it moves
what stands in the holes; hidden weights are not there, and get the difference when the job is restored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedqsn_cli.artifacts import ledger as ledgers
from fedqsn_cli.artifacts.manifests import MODEL_MANIFEST, UPDATE_TENSORS, ModelManifest, manifest_bytes
from fedqsn_cli.checkpoint import ArtifactWriter, write_file_atomically
from fedqsn_cli.errors import InputError, RefusedUpdate
from fedqsn_cli.export.companions import copy_companions
from fedqsn_cli.export.outputs import tensor_specs
from fedqsn_cli.export.session import keep_outside
from fedqsn_cli.kernels.hash_threads import HashThreads
from fedqsn_cli.masks.job_key import JobKey
from fedqsn_cli.masks.job_masks import ServerMasks
from fedqsn_cli.merging.job_model import merged_manifest, open_job_model
from fedqsn_cli.merging.line_search import Search, best_step
from fedqsn_cli.merging.read_update import ClientUpdate, FileHash, open_updates
from fedqsn_cli.merging.results import MergedClient, MergeResult
from fedqsn_cli.merging.streaming import End, Held, Merger, Sink, stream
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.models.residual import Residual, residual_sink, residual_specs
from fedqsn_cli.models.tensor_task import TensorTask, tensor_tasks
from fedqsn_cli.options import MergeOptions
from fedqsn_cli.progress import SILENT, Progress

if TYPE_CHECKING:
    from fedqsn_cli.merging.interpolate import Development


def merge(
    source: str | Path, updates: Sequence[str | Path], options: MergeOptions, *, progress: Progress = SILENT
) -> MergeResult:
    """Merge updates into the global model or the server model; or, with `restore`, end a job.

    η is `server_lr`, γ `control_weight`, λ `blend`.

    Args:
        source: the model that the proxies were made of. updates: update directories.
        options: see `MergeOptions`.
        progress: told of bytes and examples.

    Raises:
        RefusedUpdate: an update is foreign, stale, doubled, malformed, non-finite or too large.
        GateFailed: server_lr is auto, and every step makes the model worse.
        InputError: anything else does not fit together. Nothing was written then, in any of these cases.

    Example:
        >>> merge("global/", ["updates/alice"], "next/", key="job.key", ledger="ledger.jsonl").covered
    """
    _check_updates(updates, options)
    outside = {"key": options.key, "ledger": options.ledger, "eval-data": options.eval_data, "report": options.report}
    keep_outside(Path(options.out), **outside)
    development = _development(options)
    if options.restore is not None:
        from fedqsn_cli.merging.restore import restore_model

        result = restore_model(source, options.restore, options, development, progress=progress)
    else:
        job, model = open_job_model(str(source), options.key)
        with HashThreads() as hashing, ArtifactWriter(Path(options.out), force=options.force, hashed=False) as writer:
            door = _Door(job, model, options.required_ledger(), hashing)
            opened = door.updates(updates, options.max_examples)
            own = door.control(options.control, opened) if options.control is not None else None
            merging = _Merging(model, door.tasks, opened, own, options, hashing, progress)
            result = merging.write(job, writer, development)
    if options.report is not None and result.search is not None:
        from fedqsn_cli.merging.page import render

        write_file_atomically(Path(options.report), render(result.search).encode())
    return result


def _check_updates(updates: Sequence[str | Path], options: MergeOptions) -> None:
    """Refuse updates where none are wanted, none where some are, and a report that has no place. Raises InputError."""
    if options.restore is not None and updates:
        raise InputError("a restore takes no updates", where="--restore", hint="merge them first")
    if options.restore is None and not updates:
        raise InputError("no update was given", hint="name the update directories, or end the job with --restore")
    if options.report is not None and not Path(options.report).absolute().parent.is_dir():
        raise InputError("there is no such folder", where=Path(options.report).parent, hint="make it first")
    if options.report is not None and Path(options.report).is_dir():
        raise InputError("is a directory", where=options.report, hint="name a file")


def _development(options: MergeOptions) -> Development | None:
    """The owner's data, read before anything else is; None where nothing is looked for."""
    if options.eval_data is None:
        return None
    from fedqsn_cli.merging.interpolate import Development

    return Development.of(options.eval_data, options.batch_size, options.max_length, options.device)


class _Door:
    """Lets updates in: those of this job, in its ledger, of one model."""

    def __init__(self, job: JobKey, model: OpenModel, ledger: Path, hashing: HashThreads) -> None:
        self._masks = ServerMasks(job)
        self._model = model
        self._ledger = ledger
        self._hashing = hashing
        self._releases = {release.proxy_id: release for release in ledgers.read(ledger)}
        self.tasks = tensor_tasks(model, None, self._masks.hidden)

    def updates(self, folders: Sequence[str | Path], max_examples: int | None) -> list[ClientUpdate]:
        """The updates, in the order of clients. Raises RefusedUpdate."""
        opened = open_updates(
            [Path(folder) for folder in folders],
            masks=self._masks,
            plan=self._model.plan,
            releases=self._releases,
            ledger=self._ledger,
            max_examples=max_examples,
            hashing=self._hashing,
        )
        for update in opened:
            if update.moves_fill and self._model.kind != "server-model":
                raise RefusedUpdate(
                    "its client trained the public base in the holes, too, and a global model has no holes",
                    where=update.folder,
                    hint="merge it into the server model; a --restore puts all together",
                )
        return opened

    def control(self, folder: str | Path, others: Sequence[ClientUpdate]) -> ClientUpdate:
        """The control update: as good as any other, of nobody whose update is merged. Raises RefusedUpdate."""
        (control,) = self.updates([folder], None)
        for other in others:
            if other.client == control.client:
                raise RefusedUpdate(
                    f"client {control.client!r} sent an update too", where=folder, hint="a control is not merged"
                )
        if control.release.model_digest != others[0].release.model_digest:
            raise RefusedUpdate(
                f"the control was trained on another model than the update in {others[0].folder}",
                where=folder,
                hint="train it on a proxy of the same round",
            )
        return control


@dataclass
class _Merging:
    """A model and what is merged into it. Looking for η goes through all of it once more than writing alone."""

    model: OpenModel
    tasks: Sequence[TensorTask]
    updates: list[ClientUpdate]
    control: ClientUpdate | None
    options: MergeOptions
    hashing: HashThreads
    progress: Progress

    def write(self, job: JobKey, writer: ArtifactWriter, development: Development | None) -> MergeResult:
        """Write the merged model and publish it."""
        search = self._search(development) if development is not None else None
        rate = search.chosen if search else float(self.options.server_lr)
        metadata = self.model.checkpoint.metadata
        sink = writer.tensors(
            "model", tensor_specs(self.tasks, None), max_shard_bytes=self.options.max_shard_bytes, metadata=metadata
        )
        rest = residual_sink(writer, self.model.plan.tensors, None)
        merger, digest = self._send(rate, sink, rest)
        sink.close()
        if rest is not None:
            rest.close()
        copy_companions(self.model, writer)
        writer.add_bytes(MODEL_MANIFEST, manifest_bytes(self._manifest(job, digest)))
        path = writer.publish()
        covered = merger.covered / sum(task.size for task in self.tasks)
        return MergeResult(
            str(path),
            self.model.kind,
            tuple(_client(update, merger) for update in self.updates),
            merger.examples,
            covered,
            digest,
            _client(self.control, merger) if self.control else None,
            rate,
            None,
            search,
        )

    def _manifest(self, job: JobKey, digest: str | None) -> ModelManifest:
        """`fedqsn.json`, which tells whether what stands in the holes is still the public base."""
        manifest = merged_manifest(self.model, job, digest)
        if any(update.moves_fill for update in self.updates):
            manifest = manifest.model_copy(update={"trained_fill": True})
        return manifest

    def _search(self, development: Development) -> Search:
        """η with the lowest loss. Every check of the updates is done before the model is made to answer."""
        from fedqsn_cli.merging.interpolate import Line

        after, before = self._stepped(), self._held()
        line = Line(self.model.checkpoint, before, after, development, self.progress)
        return best_step(line.measure, line.examples, self.progress, allow_worse=self.options.allow_worse)

    def _stepped(self) -> End:
        """The model after a step of η = 1; leaves the updates ready to be read once more."""
        weights, residual = self._empty()
        self._send(1.0, weights, residual)
        self.updates = [_again(update, self.hashing) for update in self.updates]
        self.control = _again(self.control, self.hashing) if self.control else None
        return weights, residual

    def _held(self) -> End:
        """The model as it is now, and what it could not hold."""
        weights, residual = self._empty()
        kept = Residual(self.model)
        for task in self.tasks:
            lead, rows, cols = task.layout.view
            weights.write(task.name, 0, self.model.read_rows(task.name, task.layout, 0, lead * rows))
            if task.name in residual.bytes:
                residual.write(task.name, 0, kept.rows(task.name, 0, lead * rows, cols))
        return weights, residual

    def _empty(self) -> End:
        return Held(tensor_specs(self.tasks, None)), Held(residual_specs(self.model.plan.tensors))

    def _send(self, rate: float, sink: Sink, rest: Sink | None) -> tuple[Merger, str | None]:
        """One pass over everything, and what can only be checked once everything went by. Raises RefusedUpdate."""
        options = self.options
        merger = Merger(
            self.model, self.updates, options.normalize, rate, self.hashing, self.control, options.control_weight
        )
        digest = stream(merger, self.tasks, sink, rest, self.progress)
        if merger.before.hexdigest(self.tasks) != self.updates[0].release.model_digest:
            raise RefusedUpdate(
                "the updates were trained on proxies of another model",
                where=self.model.source.reference,
                hint="give the model that this round's proxies were exported from",
            )
        for update in [*self.updates, *([self.control] if self.control else [])]:
            update.finish()
            norm = _relative(update, merger)
            if norm > options.max_update_norm:
                raise RefusedUpdate(
                    f"its norm is {norm:.3g} times the model's, over --max-update-norm {options.max_update_norm:g}",
                    where=update.folder,
                )
        return merger, digest


def _again(update: ClientUpdate, hashing: HashThreads) -> ClientUpdate:
    """The same file, to be read once more; another one in its place would be refused."""
    hasher = FileHash(update.folder / UPDATE_TENSORS, update.identity, hashing.queue())
    return replace(update, squares=0.0, hash=hasher)


def _relative(update: ClientUpdate, merger: Merger) -> float:
    return math.sqrt(update.squares / merger.squares) if merger.squares else 0.0


def _client(update: ClientUpdate, merger: Merger) -> MergedClient:
    examples = update.manifest.num_examples
    return MergedClient(
        client=update.client,
        round=update.release.round,
        num_examples=examples,
        share=0.0 if update is merger.control else examples / merger.examples,
        relative_norm=_relative(update, merger),
        first_loss=update.manifest.losses.first,
        last_loss=update.manifest.losses.last,
    )
