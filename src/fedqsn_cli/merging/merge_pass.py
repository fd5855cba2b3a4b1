"""The pass of a merge: one chunk of the model, then the same rows of every update, then those of a control update.

Memory holds one chunk, its sum and a few chunks read ahead, however many clients there are; a rule that looks at
several updates at once takes fewer rows at a time.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np

from fedqsn_cli.kernels.digests import algorithm_of
from fedqsn_cli.kernels.hash_threads import HashThreads
from fedqsn_cli.merging.average import is_average, is_matrix, step_by_average
from fedqsn_cli.merging.rules.aggregation import Aggregation
from fedqsn_cli.merging.rules.chunk_stack import ChunkStack
from fedqsn_cli.merging.rules.order_rules import OrderRule
from fedqsn_cli.merging.step.chunk_sum import ChunkStep, ChunkSum, Scratch
from fedqsn_cli.merging.step.chunks import (
    ModelChunk,
    Source,
    average_elements,
    joint_chunks,
    stack_elements,
    visible_rows,
)
from fedqsn_cli.merging.step.model_measures import ModelMeasures
from fedqsn_cli.merging.step.server_optimizer import ServerOptimizer
from fedqsn_cli.merging.updates.measures import ModelSizes
from fedqsn_cli.merging.updates.partial_sum import PartialReader
from fedqsn_cli.merging.updates.read_update import ClientUpdate, UpdateReader
from fedqsn_cli.merging.updates.verify import Round
from fedqsn_cli.models.digest import ModelHash
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.models.tensor_task import TensorTask


def sum_up(
    chunk: ModelChunk,
    pieces: Iterator[Any],
    clients: Sequence[UpdateReader],
    partials: Sequence[PartialReader],
    how: Aggregation,
    scratch: Scratch,
) -> ChunkSum:
    """The weighted sum of all updates, and of partial sums, over one chunk.

    Args:
        pieces: what comes next are their rows in this chunk.

    Raises:
        RefusedUpdate: an update is not finite, or a term is too large for an exact sum.
    """
    chunk_sum = ChunkSum(chunk, scratch, len(clients), how.least)
    for reader, weight, factor in zip(clients, how.weights, how.factors, strict=True):
        chunk_sum.add(reader, next(pieces), weight, factor)
    for partial in partials:
        chunk_sum.add_partial(partial.take(next(pieces)))
    chunk_sum.close()
    return chunk_sum


class MergePass:
    """Reads a model and all updates in step. What it counts is complete once all chunks were taken.

    Args:
        tasks: the tensors of `model`, in order.
        found: the updates of the clients, and sums of such. control: an update of the owner's own, taken off what the
            clients sent.
        how: the way in which updates are put together. rate: η.
        optimizer: what makes a step of the average; None takes it as it is.
    """

    def __init__(
        self,
        model: OpenModel,
        tasks: Sequence[TensorTask],
        found: Round,
        control: ClientUpdate | None,
        how: Aggregation,
        rate: float,
        optimizer: ServerOptimizer | None,
        hashing: HashThreads,
    ) -> None:
        self._model = model
        self._tasks = tasks
        self._how = how
        self._rate = rate
        self._optimizer = optimizer
        self._scratch = Scratch()
        self.clients = [UpdateReader(update, hashing.queue()) for update in found.updates]
        self.partials = [PartialReader(each, hashing.queue()) for each in found.partials]
        self.control = UpdateReader(control, hashing.queue()) if control else None
        alone = not found.partials and control is None and optimizer is None
        self._averages = alone and is_average(how, len(self.clients))
        self.size = sum(task.size for task in tasks)
        """Number of elements of the model."""
        self.covered = 0
        """Number of elements that at least one client trained."""
        self._before = ModelMeasures(hashing.queue(), found.model_digest)
        hashed = model.kind == "server-model" or optimizer is not None
        self._after = ModelHash(hashing.queue(), algorithm_of(found.model_digest)) if hashed else None

    @property
    def sizes(self) -> ModelSizes:
        """Of the model that was read."""
        return self._before.sizes

    @property
    def readers(self) -> list[UpdateReader]:
        """Of all updates, the control last."""
        return [*self.clients, *([self.control] if self.control else [])]

    def chunks(self) -> Generator[ModelChunk, None, None]:
        """The chunks of the merged model, in order.

        Raises:
            RefusedUpdate: an update is not finite, or the merged model is not. Digests and norms are only known when
                all chunks were taken.
        """
        elements = average_elements() if self._averages else None
        if self._how.order:
            elements = stack_elements(len(self.clients))
        sources: list[Source] = [*self.clients, *self.partials, *([self.control] if self.control else [])]
        with closing(joint_chunks(self._model, self._tasks, sources, elements)) as chunks:
            for chunk, pieces in chunks:
                self._merge(chunk, pieces)
                yield chunk

    def digest_before(self) -> str:
        """Content digest of the model that was read."""
        return self._before.digest(self._tasks)

    def digest_after(self) -> str | None:
        """Content digest of the merged model, as the next export will compute it; None where nobody needs it."""
        return self._after.digest(self._tasks) if self._after else None

    def _merge(self, chunk: ModelChunk, pieces: Iterator[Any]) -> None:
        """Move a chunk in place, and hash it before and after; the next pieces are the same rows of every update."""
        self._before.take(chunk, copy=True)  # the rows move while these are hashed
        if chunk.task.tensor.is_float:
            self._step(chunk, pieces)
        if self._after is not None:
            self._after.update(chunk.task.name, visible_rows(chunk, copy=False))

    def _step(self, chunk: ModelChunk, pieces: Iterator[Any]) -> None:
        """W' = W + η Δ: put all updates together, take the control off, move the rows."""
        if self._averages and is_matrix(chunk):
            taken = [next(pieces) for _ in self.clients]
            self.covered += step_by_average(chunk, self.clients, taken, self._how, self._rate)
            return
        step: ChunkStep
        if self._how.order is not None:
            step = self._ordered(chunk, pieces, self._how.order)
        else:
            step = sum_up(chunk, pieces, self.clients, self.partials, self._how, self._scratch)
        step.compare()
        if self._how.noise is not None:
            step.disturb(self._how.noise)
        if self.control is not None:
            step.subtract(self.control, next(pieces), self._how.control_weight)
        self.covered += step.covered
        if self._optimizer is not None:
            step.move_by(self._optimizer, self._rate, self._how.divisor)
        else:
            step.move(self._rate, self._how.divisor)

    def _ordered(self, chunk: ModelChunk, pieces: Iterator[Any], rule: OrderRule) -> ChunkStep:
        """What a rule makes of all updates side by side."""
        stack, left_out = ChunkStack(chunk, self._scratch, len(self.clients)), np.array(self._how.weights) == 0
        places = np.argsort(np.argsort(left_out, kind="stable"))  # those that count come first
        for place, reader, factor in zip(places, self.clients, self._how.factors, strict=True):
            stack.add(int(place), reader, next(pieces), factor)
        stack.combine(rule, int(np.count_nonzero(~left_out)))
        return stack
