"""`merge --partial`: the exact sum of some updates of a round, for a merge of all of them.

It reads what a merge reads, the model for its digest and sizes, and checks what a merge checks; but no step is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.artifacts.partial_folder import SUM, WEIGHTS, unit_run
from fedqsn_cli.checkpoint import TensorSink
from fedqsn_cli.kernels.hash_threads import HashThreads
from fedqsn_cli.merging.merge_pass import sum_up
from fedqsn_cli.merging.rules.aggregation import Aggregation
from fedqsn_cli.merging.step.chunk_sum import ChunkSum, Scratch
from fedqsn_cli.merging.step.chunks import ModelChunk, joint_chunks
from fedqsn_cli.merging.step.model_measures import ModelMeasures
from fedqsn_cli.merging.updates.measures import ModelSizes
from fedqsn_cli.merging.updates.partial_sum import PartialReader
from fedqsn_cli.merging.updates.read_update import UpdateReader
from fedqsn_cli.merging.updates.verify import Round
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.models.tensor_task import TensorTask
from fedqsn_cli.progress import Progress


class PartialPass:
    """Reads a model, updates and partial sums in step, and writes their sum.

    Args:
        tasks: the tensors of `model`, in order.
    """

    def __init__(
        self, model: OpenModel, tasks: Sequence[TensorTask], found: Round, how: Aggregation, hashing: HashThreads
    ) -> None:
        self._model = model
        self._tasks = tasks
        self._how = how
        self._scratch = Scratch()
        self._measures = ModelMeasures(hashing.queue(), found.model_digest)
        self.clients = [UpdateReader(update, hashing.queue()) for update in found.updates]
        self.partials = [PartialReader(each, hashing.queue()) for each in found.partials]
        self.size = sum(task.size for task in tasks)
        self.covered = 0

    def write(self, sink: TensorSink, progress: Progress) -> None:
        """Write the sum. Digests and norms are only known afterwards. Raises RefusedUpdate."""
        progress.start("adding up", self._model.checkpoint.total_bytes, "bytes")
        with closing(joint_chunks(self._model, self._tasks, [*self.clients, *self.partials])) as chunks:
            for chunk, pieces in chunks:
                self._measures.take(chunk, copy=False)
                if chunk.task.tensor.is_float:
                    chunk_sum = sum_up(chunk, pieces, self.clients, self.partials, self._how, self._scratch)
                    self.covered += chunk_sum.covered
                    self._store(sink, chunk, chunk_sum)
                progress.advance(chunk.values.nbytes)
        progress.finish()

    @property
    def sizes(self) -> ModelSizes:
        """Of the model that was read."""
        return self._measures.sizes

    def digest(self) -> str:
        """Content digest of the model that was read."""
        return self._measures.digest(self._tasks)

    def _store(self, sink: TensorSink, chunk: ModelChunk, chunk_sum: ChunkSum) -> None:
        """Write the sums of a chunk, and what its units count unless an earlier chunk had the same units."""
        name, plan = chunk.task.name, chunk.task.plan
        _, height, cols = plan.view
        rows: NDArray[np.int64] = np.stack((chunk_sum.digits.high, chunk_sum.digits.low), axis=1)
        sink.write(name + SUM, 16 * cols * chunk.first, rows)
        begins = {None: chunk.first == 0, "column": chunk.first % max(height, 1) == 0}
        if begins.get(plan.axis, True):
            run = unit_run(plan.axis, plan.view, chunk.first, chunk.rows)
            sink.write(name + WEIGHTS, 8 * run.first, chunk_sum.weights.astype(np.int64))
