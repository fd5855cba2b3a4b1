"""A first pass over all updates, where a merge must know them before it begins: which are refused, how large they are.

It is made when updates that are refused are left out, and when a rule needs norms of whole updates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.errors import InputError, RefusedUpdate
from fedqsn_cli.kernels.hash_threads import HashThreads
from fedqsn_cli.merging.rules.chunk_stack import ChunkStack
from fedqsn_cli.merging.rules.client_weights import compares
from fedqsn_cli.merging.rules.distances import PairSums
from fedqsn_cli.merging.step.chunk_sum import Scratch, accumulate
from fedqsn_cli.merging.step.chunks import (
    ModelChunk,
    joint_chunks,
    stack_elements,
)
from fedqsn_cli.merging.step.model_measures import ModelMeasures
from fedqsn_cli.merging.sums.exact_sum import Digits
from fedqsn_cli.merging.updates.admission import (
    check_claims,
    check_norms,
    check_partials,
    require_enough,
    require_summable,
)
from fedqsn_cli.merging.updates.measures import ModelSizes
from fedqsn_cli.merging.updates.partial_sum import PartialReader
from fedqsn_cli.merging.updates.read_update import ClientUpdate, UpdateChunk, UpdateReader
from fedqsn_cli.merging.updates.refusals import Refusals
from fedqsn_cli.merging.updates.verify import Round, Sent, UpdateVerifier, is_late
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.models.tensor_task import TensorTask
from fedqsn_cli.options import MergeOptions
from fedqsn_cli.progress import Progress

Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Survey:
    """What a first pass found.

    Args:
        updates: those that passed all checks, in order. norms: ‖Δ_k‖₂ of each.
        pairs: what distances are made of, where a rule needs them. places: those of the updates among the pairs.
    """

    updates: tuple[ClientUpdate, ...]
    norms: tuple[float, ...]
    pairs: PairSums | None
    places: tuple[int, ...]

    def distances(self, factors: Sequence[float]) -> Doubles:
        """Of the updates from one another, each times its factor. Raises RefusedUpdate: two cannot be compared."""
        assert self.pairs is not None
        found = self.pairs.distances(self.places, factors)
        if not np.isfinite(found).all():
            first, second = (self.updates[int(at)] for at in np.argwhere(~np.isfinite(found))[0])
            what = f"it has no weight in common with the update of client {second.client!r}"
            raise RefusedUpdate(what, where=first.folder, hint="a rule of distances cannot compare them")
        return found


class SurveyPass:
    """Reads a model and updates in step, and changes nothing.

    Args:
        refusals: what is wrong with an update is noted there, or ends the pass.
        compares: whether distances between updates are measured.
    """

    def __init__(
        self,
        model: OpenModel,
        tasks: Sequence[TensorTask],
        updates: Sequence[ClientUpdate],
        refusals: Refusals,
        hashing: HashThreads,
        *,
        compares: bool,
    ) -> None:
        self._model = model
        self._tasks = tasks
        self._refusals = refusals
        self._scratch = Scratch()
        self._readers = [UpdateReader(update, hashing.queue()) for update in updates]
        self._bad: set[str] = set()
        released = next((update.model_digest for update in updates), None)  # there may be partial sums alone
        self._measures = ModelMeasures(hashing.queue(), released)
        self._pairs = PairSums(len(updates)) if compares else None

    def run(self, options: MergeOptions, progress: Progress) -> Survey:
        """Read everything. Raises RefusedUpdate: something is wrong with an update, and that ends the merge."""
        progress.start("checking updates", self._model.checkpoint.total_bytes, "bytes")
        elements = stack_elements(len(self._readers)) if self._pairs else None
        with closing(joint_chunks(self._model, self._tasks, self._readers, elements)) as chunks:
            for chunk, pieces in chunks:
                self._take(chunk, pieces)
                progress.advance(chunk.values.nbytes)
        progress.finish()
        digest = self._measures.digest(self._tasks)
        for reader in self._readers:
            update = reader.update
            with self._refusals.noting(update.folder, update.client):
                require_model(update, digest, self._model)
                if str(update.folder) not in self._bad:
                    reader.finish()
                    check_norms(update, reader.measures, self._measures.sizes, options)
        return self._result()

    def _result(self) -> Survey:
        left = {str(update.folder) for update in self._refusals.without([r.update for r in self._readers])}
        places = tuple(number for number, r in enumerate(self._readers) if str(r.update.folder) in left)
        kept = [self._readers[number] for number in places]
        norms = tuple(reader.measures.squares**0.5 for reader in kept)
        return Survey(tuple(reader.update for reader in kept), norms, self._pairs, places)

    def _take(self, chunk: ModelChunk, pieces: Iterator[UpdateChunk]) -> None:
        self._measures.take(chunk, copy=False)
        if not chunk.task.tensor.is_float:
            return
        stack = ChunkStack(chunk, self._scratch, len(self._readers)) if self._pairs else None
        for number, reader in enumerate(self._readers):
            with self._noting(reader):
                self._measure(chunk, stack, number, next(pieces))
        if self._pairs and stack and stack.untrained:
            self._pairs.add_zeros(stack.seen, chunk.values.size)
        elif self._pairs and stack:
            self._pairs.add(stack.values, stack.seen, stack.strides)

    @contextmanager
    def _noting(self, reader: UpdateReader) -> Iterator[None]:
        """Note the first thing that is wrong with an update, and look no further into it."""
        folder = reader.update.folder
        with self._refusals.noting(folder, reader.update.client):
            try:
                yield
            except InputError:
                self._bad.add(str(folder))
                raise

    def _measure(self, chunk: ModelChunk, stack: ChunkStack | None, number: int, piece: UpdateChunk) -> None:
        """Measure a piece of an update in which nothing was wrong so far. Raises RefusedUpdate."""
        reader = self._readers[number]
        if str(reader.update.folder) in self._bad:
            return
        if stack is not None:
            stack.add(number, reader, piece, 1.0)
        else:
            weight = reader.update.examples / reader.update.scale(chunk.task.plan)
            accumulate(lambda: self._unused(chunk.values.shape), chunk, reader, piece, weight)

    def _unused(self, shape: tuple[int, ...]) -> Digits:
        """Takes sums that nobody looks at: what matters is whether a merge can add them up."""
        high, low = (self._scratch.empty(use, shape).view(np.int64) for use in ("high", "low"))
        return Digits(high, low)


def admit(
    verifier: UpdateVerifier,
    folders: Sequence[str | Path],
    model: OpenModel,
    tasks: Sequence[TensorTask],
    refusals: Refusals,
    options: MergeOptions,
    progress: Progress,
) -> tuple[Round, Survey | None]:
    """What is merged, and what a first pass over the updates found, if one was needed.

    Raises:
        RefusedUpdate: one is refused, and the merge does not go on without it; or too few are left.
        InputError: there are partial sums, and this merge needs the updates themselves.
    """
    opened = check_partials(verifier.round(folders, refusals), options, refusals)
    found = check_claims(opened, options.max_examples, refusals)
    require_enough(found.clients, options.min_clients, refusals)
    require_summable(found)
    if options.on_refused == "fail" and not compares(options) and options.clip_norm is None:
        return found, None
    with HashThreads() as hashing:
        survey_pass = SurveyPass(model, tasks, found.updates, refusals, hashing, compares=compares(options))
        survey = survey_pass.run(options, progress)
    left = Round(survey.updates, found.partials)
    require_enough(left.clients, options.min_clients, refusals)
    if all(is_late(each) for each in left):
        raise RefusedUpdate("every update that is left was trained on an earlier model", where=model.source.reference)
    return left, survey


def check_read(
    readers: Sequence[UpdateReader],
    partials: Sequence[PartialReader],
    digest: str,
    sizes: ModelSizes,
    model: OpenModel,
    options: MergeOptions,
) -> None:
    """Check what is only known once everything was read: models, digests of files and norms.

    Args:
        digest: of the model that was read. sizes: of its weights.

    Raises:
        RefusedUpdate: an update or partial sum is of another model, is not what its manifest says, or is too large.
    """
    for reader in readers:
        require_model(reader.update, digest, model)
    for partial in partials:
        require_model(partial.sum, digest, model)
        partial.finish()
    for reader in readers:
        reader.finish()
        check_norms(reader.update, reader.measures, sizes, options)


def require_model(update: Sent, digest: str, model: OpenModel) -> None:
    """Refuse an update that was trained on a proxy of another model, unless it may be late. Raises RefusedUpdate."""
    if update.model_digest != digest and not is_late(update):
        raise RefusedUpdate(
            "the updates were trained on proxies of another model",
            where=model.source.reference,
            hint="give the model that this round's proxies were exported from",
        )
