"""A first pass over all updates, where a merge must know them before it begins: which are refused, how large they are.

It is made when updates that are refused are left out, and when a rule needs norms of whole updates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.errors import InputError, RefusedUpdate
from fedqsn_cli.kernels.digests import algorithm_of
from fedqsn_cli.kernels.hash_threads import HashThreads
from fedqsn_cli.merging import arithmetic
from fedqsn_cli.merging.admission import check_norms
from fedqsn_cli.merging.chunk_stack import ChunkStack
from fedqsn_cli.merging.chunk_sum import Scratch, accumulate
from fedqsn_cli.merging.chunks import (
    ModelChunk,
    UpdateChunk,
    joint_chunks,
    stack_elements,
    visible_count,
    visible_rows,
)
from fedqsn_cli.merging.distances import PairSums
from fedqsn_cli.merging.measures import ModelSizes
from fedqsn_cli.merging.read_update import ClientUpdate, UpdateReader
from fedqsn_cli.merging.refusals import Refusals
from fedqsn_cli.models.digest import ModelHash
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
        self._digest = ModelHash(hashing.queue(), algorithm_of(updates[0].release.model_digest))
        self._sizes = ModelSizes()
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
        digest = self._digest.digest(self._tasks)
        for reader in self._readers:
            update = reader.update
            with self._refusals.noting(update.folder, update.client):
                require_model(update, digest, self._model)
                if str(update.folder) not in self._bad:
                    reader.finish()
                    check_norms(update, reader.measures, self._sizes, options)
        return self._result()

    def _result(self) -> Survey:
        left = {str(update.folder) for update in self._refusals.without([r.update for r in self._readers])}
        places = tuple(number for number, r in enumerate(self._readers) if str(r.update.folder) in left)
        kept = [self._readers[number] for number in places]
        norms = tuple(reader.measures.squares**0.5 for reader in kept)
        return Survey(tuple(reader.update for reader in kept), norms, self._pairs, places)

    def _take(self, chunk: ModelChunk, pieces: Iterator[UpdateChunk]) -> None:
        visible = visible_rows(chunk, copy=False)
        self._digest.update(chunk.task.name, visible)
        if not chunk.task.tensor.is_float:
            return
        self._sizes.add(chunk.task, arithmetic.sum_of_squares(visible, chunk.task.tensor.dtype), visible_count(chunk))
        stack = ChunkStack(chunk, self._scratch, len(self._readers)) if self._pairs else None
        for number, reader in enumerate(self._readers):
            with self._noting(reader):
                self._measure(chunk, stack, number, next(pieces))
        if self._pairs and stack:
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
            accumulate(self._scratch.zeros("total", chunk.values.shape), chunk, reader, piece, 1.0)


def require_model(update: ClientUpdate, digest: str, model: OpenModel) -> None:
    """Refuse an update that was trained on a proxy of another model. Raises RefusedUpdate."""
    if update.release.model_digest != digest:
        raise RefusedUpdate(
            "the updates were trained on proxies of another model",
            where=model.source.reference,
            hint="give the model that this round's proxies were exported from",
        )
