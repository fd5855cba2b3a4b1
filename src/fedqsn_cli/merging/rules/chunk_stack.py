"""One chunk of all updates side by side: what rules that compare clients need of it.

    values[k]   the rows of client k's Δ, 0 where it did not see an element
    seen[k]     1 for each unit that it saw

A unit of the element in row r and column c is number r * across + c * along of the chunk.
"""

from __future__ import annotations

import numpy as np

from fedqsn_cli.merging.rules.order_rules import OrderRule
from fedqsn_cli.merging.step.chunk_sum import ChunkStep, Doubles, Scratch, accumulate
from fedqsn_cli.merging.step.chunks import ModelChunk
from fedqsn_cli.merging.updates.read_update import UpdateChunk, UpdateReader


class ChunkStack(ChunkStep):
    """The rows of all updates in one chunk of the model.

    Attributes:
        seen: [clients, units].
    """

    def __init__(self, chunk: ModelChunk, scratch: Scratch, clients: int) -> None:
        super().__init__(chunk, scratch, chunk.rows)
        self._values: Doubles | None = None
        self.seen = np.zeros((clients, self._weights.size))

    @property
    def values(self) -> Doubles:
        """[clients, rows, cols], zeros until something is added."""
        if self._values is None:
            self._values = self._scratch.zeros("stack", (len(self.seen), *self._total.shape))
        return self._values

    @property
    def untrained(self) -> bool:
        """Whether no client trained anything of these rows."""
        return self._values is None

    def add(self, number: int, reader: UpdateReader, piece: UpdateChunk, factor: float) -> None:
        """Put the Δ_k of a client, `factor` times, beside the others. Raises RefusedUpdate for NaN, infinity."""
        update, tensor = reader.update, self._chunk.task.plan
        accumulate(lambda: self.values[number], self._chunk, reader, piece, factor / update.scale(tensor))
        self.seen[number, piece.part.index if update.axis(tensor) else slice(None)] = 1.0
        self._kept.append((reader, piece))

    @property
    def strides(self) -> tuple[int, int]:
        """`across` and `along`: how far apart the units of neighbouring rows and of neighbouring columns are."""
        cols = self._total.shape[1]
        return {None: (0, 0), "row": (1, 0), "column": (0, 1), "element": (cols, 1)}[self._chunk.task.plan.axis]

    def combine(self, rule: OrderRule, chosen: int) -> None:
        """Make one step of what the first `chosen` clients sent; a unit that too few of them saw stays."""
        seen = self.seen[:chosen]
        self._weights[:] = seen.sum(axis=0) >= rule.least
        if not self.untrained:
            rule.apply(self.values[:chosen], seen, self.strides, self._total)
            self._moves = True
