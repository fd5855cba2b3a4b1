"""A first pass over all updates, where a merge must know them before it begins: which are refused, how large they are.

It is made when updates that are refused are left out, and when a rule needs norms of whole updates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from fedqsn_cli.errors import RefusedUpdate
from fedqsn_cli.kernels.hash_threads import HashThreads
from fedqsn_cli.merging import arithmetic
from fedqsn_cli.merging.admission import check_norms
from fedqsn_cli.merging.chunk_sum import Scratch, accumulate
from fedqsn_cli.merging.chunks import ModelChunk, UpdateChunk, joint_chunks, visible_count, visible_rows
from fedqsn_cli.merging.measures import ModelSizes
from fedqsn_cli.merging.read_update import ClientUpdate, UpdateReader
from fedqsn_cli.merging.refusals import Refusals
from fedqsn_cli.models.digest import ModelHash
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.models.tensor_task import TensorTask
from fedqsn_cli.options import MergeOptions
from fedqsn_cli.progress import Progress


@dataclass(frozen=True, slots=True)
class Survey:
    """What a first pass found.

    Args:
        updates: those that passed all checks, in order. norms: ‖Δ_k‖₂ of each.
    """

    updates: tuple[ClientUpdate, ...]
    norms: tuple[float, ...]


class SurveyPass:
    """Reads a model and updates in step, and changes nothing.

    Args:
        refusals: what is wrong with an update is noted there, or ends the pass.
    """

    def __init__(
        self,
        model: OpenModel,
        tasks: Sequence[TensorTask],
        updates: Sequence[ClientUpdate],
        refusals: Refusals,
        hashing: HashThreads,
    ) -> None:
        self._model = model
        self._tasks = tasks
        self._refusals = refusals
        self._scratch = Scratch()
        self._readers = [UpdateReader(update, hashing.queue()) for update in updates]
        self._bad: set[str] = set()
        self._digest = ModelHash(hashing.queue())
        self._sizes = ModelSizes()

    def run(self, options: MergeOptions, progress: Progress) -> Survey:
        """Read everything. Raises RefusedUpdate: something is wrong with an update, and that ends the merge."""
        progress.start("checking updates", self._model.checkpoint.total_bytes, "bytes")
        with closing(joint_chunks(self._model, self._tasks, self._readers)) as chunks:
            for chunk, pieces in chunks:
                self._take(chunk, pieces)
                progress.advance(chunk.values.nbytes)
        progress.finish()
        digest = self._digest.hexdigest(self._tasks)
        for reader in self._readers:
            update = reader.update
            with self._refusals.noting(update.folder, update.client):
                require_model(update, digest, self._model)
                if str(update.folder) not in self._bad:
                    reader.finish()
                    check_norms(update, reader.measures, self._sizes, options)
        left = {str(update.folder) for update in self._refusals.without([r.update for r in self._readers])}
        kept = [reader for reader in self._readers if str(reader.update.folder) in left]
        return Survey(tuple(reader.update for reader in kept), tuple(reader.measures.squares**0.5 for reader in kept))

    def _take(self, chunk: ModelChunk, pieces: Iterator[UpdateChunk]) -> None:
        visible = visible_rows(chunk, copy=False)
        self._digest.update(chunk.task.name, visible)
        if not chunk.task.tensor.is_float:
            return
        self._sizes.add(chunk.task, arithmetic.sum_of_squares(visible, chunk.task.tensor.dtype), visible_count(chunk))
        for reader in self._readers:
            self._measure(chunk, reader, next(pieces))

    def _measure(self, chunk: ModelChunk, reader: UpdateReader, piece: UpdateChunk) -> None:
        """Measure a piece of an update in which nothing was wrong so far."""
        update = reader.update
        if str(update.folder) in self._bad:
            return
        self._bad.add(str(update.folder))
        with self._refusals.noting(update.folder, update.client):
            total = self._scratch.zeros("total", chunk.values.shape)
            accumulate(total, chunk, reader, piece, 1.0)
            self._bad.discard(str(update.folder))


def require_model(update: ClientUpdate, digest: str, model: OpenModel) -> None:
    """Refuse an update that was trained on a proxy of another model. Raises RefusedUpdate."""
    if update.release.model_digest != digest:
        raise RefusedUpdate(
            "the updates were trained on proxies of another model",
            where=model.source.reference,
            hint="give the model that this round's proxies were exported from",
        )
