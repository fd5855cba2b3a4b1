"""`merge`: weighted averaging of updates, unit by unit, one chunk of one tensor at a time.

    Δ_k = U_k / s_k                                   model coordinates
    Δ   = Σ n_k Δ_k / Σ n_k                           over the clients that saw the unit (normalize coverage)
                                                      or over all clients (normalize clients)
    W'  = W + η Δ                                     units that nobody saw keep their bits

Sums are exact (`exact_sum`), so a round may also be added up in parts (`add_up`). Other rules than this average are in
`aggregation`.

FedAvg (arXiv 1602.05629) is the case without masks and quantization. Memory holds one chunk, its sum and a few chunks
read ahead, however many clients there are; only a search for η or λ needs the whole model in memory.

A control update is the owner's own: what training on the proxy does to the model on data that is not new to it. It is
taken off every client's Δ_k, times γ, on the units that it saw.

Where clients trained the fill, too (`export_proxy`, train all), their Δ_k hold every unit. In a server model they move
the fill; hidden weights are not in it, and get the difference when the job is restored.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedqsn_cli import validate
from fedqsn_cli.artifacts.manifests import MODEL_MANIFEST, ServerStateRecord, require_same_kind
from fedqsn_cli.checkpoint import ArtifactWriter, write_file_atomically
from fedqsn_cli.checkpoint.files import keep_outside, require_file_target
from fedqsn_cli.errors import InputError, OutputExists
from fedqsn_cli.export.outputs import tensor_specs
from fedqsn_cli.kernels.hash_threads import HashThreads
from fedqsn_cli.masks.job_key import JobKey
from fedqsn_cli.merging.add_up import add_up
from fedqsn_cli.merging.central_privacy import CentralPrivacy
from fedqsn_cli.merging.ending.line_search import Search, best_step
from fedqsn_cli.merging.ending.restore import restore_model
from fedqsn_cli.merging.job_model import merged_manifest, model_sinks, open_job_model, publish
from fedqsn_cli.merging.keep_adapter import KeptStep, Tee
from fedqsn_cli.merging.merge_pass import MergePass
from fedqsn_cli.merging.merged_clients import clients_of, merged_client
from fedqsn_cli.merging.results import MergeResult
from fedqsn_cli.merging.rules.aggregation import Aggregation, aggregation
from fedqsn_cli.merging.rules.survey import admit, check_read
from fedqsn_cli.merging.step.chunks import InMemorySink, Sink, Weights, write_chunks
from fedqsn_cli.merging.step.server_optimizer import (
    SavedState,
    ServerOptimizer,
    open_state,
    require_tensors,
    state_sink,
)
from fedqsn_cli.merging.updates.read_update import ClientUpdate
from fedqsn_cli.merging.updates.refusals import Refusals
from fedqsn_cli.merging.updates.verify import Round, UpdateVerifier
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.models.residual import Residual, residual_specs
from fedqsn_cli.models.tensor_task import TensorTask, tensor_tasks
from fedqsn_cli.options import MergeOptions
from fedqsn_cli.progress import SILENT, Progress

if TYPE_CHECKING:
    from fedqsn_cli.merging.ending.interpolate import DevelopmentSet


def merge(
    source: str | Path, updates: Sequence[str | Path], options: MergeOptions, *, progress: Progress = SILENT
) -> MergeResult:
    """Merge updates into the global model or the server model; or, with `restore`, end a job.

    η is `server_lr`, γ `control_weight`, λ `blend`.

    Args:
        source: the model that the proxies were made of. updates: directories of updates, and of partial sums.
        options: see `MergeOptions`.
        progress: told of bytes and examples.

    Raises:
        RefusedUpdate: an update is foreign, stale, duplicate, malformed, non-finite or too large.
        GateFailed: server_lr is auto, and every step makes the model worse.
        InputError: anything else does not fit together. Nothing was written then, in any of these cases.

    Example:
        >>> merge("global/", ["updates/alice"], "next/", key="job.key", ledger="ledger.jsonl").covered
    """
    _check_updates(updates, options)
    outside = {"key": options.key, "ledger": options.ledger, "eval-data": options.eval_data, "report": options.report}
    keep_outside(Path(options.out), **outside, **{"keep-adapter": options.keep_adapter})
    if options.keep_adapter is not None:
        keep_outside(Path(options.keep_adapter), **outside)
    development = _development(options)
    if options.restore is not None:
        result = restore_model(source, options.restore, options, development, progress=progress)
    elif options.partial:
        result = add_up(source, updates, options, progress=progress)
    else:
        result = merge_updates(source, updates, options, development, progress=progress)
    if options.report is not None:
        from fedqsn_cli.merging.report.page import render

        write_file_atomically(Path(options.report), render(result).encode())
    return result


def _check_updates(updates: Sequence[str | Path], options: MergeOptions) -> None:
    """Refuse missing or superfluous updates, and a report path that cannot be written. Raises InputError."""
    if options.restore is not None and updates:
        raise InputError("a restore takes no updates", where="--restore", hint="merge them first")
    if options.restore is None and not updates:
        raise InputError("no update was given", hint="name the folders of updates, or end the job with --restore")
    several = len(updates) + (options.control is not None) > 1
    if several and options.verify_key is not None:
        validate.for_each_client(str(options.verify_key), "--verify-key", several=True)
    if options.report is not None:
        require_file_target(options.report)


def _development(options: MergeOptions) -> DevelopmentSet | None:
    """The owner's data, read before anything else is; None where nothing is searched for."""
    if options.eval_data is None:
        return None
    from fedqsn_cli.merging.ending.interpolate import DevelopmentSet

    return DevelopmentSet.of(options.eval_data, options.batch_size, options.max_length, options.device)


def merge_updates(
    source: str | Path,
    updates: Sequence[str | Path],
    options: MergeOptions,
    development: DevelopmentSet | None,
    *,
    progress: Progress,
) -> MergeResult:
    """Verify updates, merge them into a model, and write the result.

    Args:
        source: the model that the proxies were made of. updates: folders of updates.
        development: where `server_lr` auto looks for the lowest loss.

    Raises:
        RefusedUpdate, GateFailed, InputError: as `merge`.
    """
    job, model = open_job_model(source, options.key)
    require_same_kind(options.out, model.kind)
    with (
        ArtifactWriter(Path(options.out), force=options.force, replaces=[MODEL_MANIFEST], digest=None) as writer,
        ExitStack() as stack,
    ):
        saved = open_state(model, job, options.server_optimizer)
        late = options.staleness_discount is not None
        verifier = UpdateVerifier(job, model, options.required_ledger(), options.verify_key_of, takes_late=late)
        tasks = tensor_tasks(model, None, verifier.masks.hidden_on_the_way)
        refusals = Refusals(options.on_refused == "skip", [])
        found, survey = admit(verifier, updates, model, tasks, refusals, options, progress)
        private = CentralPrivacy(job, found.updates, options) if options.noise_multiplier is not None else None
        how = aggregation(options, found, survey, private.noise if private is not None else None)
        control = verifier.control(options.control, found) if options.control is not None else None
        kept = _kept_step(stack, found.updates, tasks, options)
        run = MergeRun(job, model, tasks, found, control, how, saved, options, progress)
        search = run.search(development) if development is not None else None
        rate = search.chosen if search else float(options.server_lr)
        merged = run.write(writer, rate, kept.saved if kept is not None else None)
        adapter = kept.publish(rate) if kept is not None else None
        digest = merged.digest_after()
        facts = {"trained_fill": True} if found.moves_fill else {}
        account = private.record() if private is not None else None
        path = publish(
            writer, model, merged_manifest(model, job, digest, added=how.merged, **facts, **run.state_record(merged))
        )
    return MergeResult(
        path=path,
        kind=model.kind,
        clients=clients_of(merged.clients, merged.partials, merged.sizes, merged.size, how),
        num_examples=found.examples,
        covered=merged.covered / merged.size,
        model_digest=digest if model.kind == "server-model" else None,
        control=merged_client(merged.control, merged.sizes, merged.size, 0.0, "control") if merged.control else None,
        server_lr=rate,
        search=search,
        refused=tuple(refusals.refused),
        adapter=adapter,
        privacy=account,
    )


def _kept_step(
    stack: ExitStack, clients: Sequence[ClientUpdate], tasks: Sequence[TensorTask], options: MergeOptions
) -> KeptStep | None:
    """The step as an adapter, if that is asked for; `stack` removes what of it is not published. Raises InputError."""
    if options.keep_adapter is None:
        return None
    path = Path(options.keep_adapter)
    if os.path.lexists(path):
        raise OutputExists("already exists, and adapters are never replaced", where=path, hint="choose another path")
    writer = stack.enter_context(ArtifactWriter(path, force=False))
    return KeptStep(writer, clients, tasks, options)


@dataclass(frozen=True, slots=True)
class MergeRun:
    """A model and what is merged into it. A search for η needs one more pass over all of it."""

    job: JobKey
    model: OpenModel
    tasks: Sequence[TensorTask]
    found: Round
    control: ClientUpdate | None
    how: Aggregation
    saved: SavedState | None
    options: MergeOptions
    progress: Progress

    def write(self, writer: ArtifactWriter, rate: float, kept: InMemorySink | None) -> MergePass:
        """Write the merged tensors and their residual; returns what the pass counted. Raises RefusedUpdate.

        Args:
            kept: gets some of the tensors, too.
        """
        limit = self.options.max_shard_bytes
        with (
            model_sinks(writer, self.model, self.tasks, limit, with_residual=True) as (sink, residual),
            self._optimizer(writer) as optimizer,
        ):
            return self._merge_into(sink if kept is None else Tee(sink, kept), residual, rate, optimizer)

    @contextmanager
    def _optimizer(self, writer: ArtifactWriter) -> Iterator[ServerOptimizer | None]:
        """The server optimizer, whose new state is complete when the block ends; None for plain steps."""
        name = self.options.server_optimizer
        if name == "sgd":
            yield None
            return
        if self.saved is not None:
            require_tensors(self.saved, self.tasks)
        sink = state_sink(writer, self.tasks, self.job, name, self.found.model_digest)
        yield ServerOptimizer(self.options, self.saved, sink)
        sink.close()

    def state_record(self, merged: MergePass) -> dict[str, object]:
        """What the manifest says about the state of the server optimizer."""
        name, after = self.options.server_optimizer, merged.digest_after()
        if name == "sgd" or after is None:
            return {"server_state": None}
        into = self.found.model_digest
        return {"server_state": ServerStateRecord(optimizer=name, merged_into=into, model=after)}

    def search(self, development: DevelopmentSet) -> Search:
        """Find η with the lowest loss. All checks of the updates are done before the model is evaluated."""
        from fedqsn_cli.merging.ending.interpolate import Interpolation

        after, before = self._after_full_step(), self._current()
        line = Interpolation(self.model.checkpoint, before, after, development, self.progress)
        return best_step(line.measure, line.examples, self.progress, allow_worse=self.options.allow_worse)

    def _after_full_step(self) -> Weights:
        """The model after a step of η = 1."""
        weights = self._in_memory()
        self._merge_into(weights.stored, weights.residual, 1.0)
        return weights

    def _current(self) -> Weights:
        """The model as it is now, with its residual."""
        weights, residual = self._in_memory(), Residual(self.model)
        for task in self.tasks:
            lead, rows, cols = task.layout.view
            weights.stored.write(task.name, 0, self.model.read_rows(task.name, task.layout, 0, lead * rows))
            if task.name in weights.residual.bytes:
                weights.residual.write(task.name, 0, residual.rows(task.name, 0, lead * rows, cols))
        return weights

    def _in_memory(self) -> Weights:
        residual = residual_specs(self.model.plan.tensors)
        return Weights(InMemorySink(tensor_specs(self.tasks, None)), InMemorySink(residual))

    def _merge_into(
        self, sink: Sink, residual: Sink | None, rate: float, optimizer: ServerOptimizer | None = None
    ) -> MergePass:
        """One pass over everything, then the checks that need all of it. Raises RefusedUpdate."""
        self.progress.start("merging", self.model.checkpoint.total_bytes, "bytes")
        with HashThreads() as hashing:
            inputs = (self.model, self.tasks, self.found, self.control)
            merged = MergePass(*inputs, self.how, rate, optimizer, hashing)
            with closing(merged.chunks()) as chunks:  # its threads end here, whatever ends the loop
                write_chunks(chunks, sink, residual, self.progress)
            self._check(merged)
        return merged

    def _check(self, merged: MergePass) -> None:
        """Check digests and norms. Raises RefusedUpdate."""
        digest = merged.digest_before()
        if self.saved is not None and self.saved.record.model != digest:
            problem = "this state of a server optimizer belongs to other weights than the model's"
            raise InputError(problem, where=self.saved.file.path, hint="take it out and begin anew")
        check_read(merged.readers, merged.partials, digest, merged.sizes, self.model, self.options)
