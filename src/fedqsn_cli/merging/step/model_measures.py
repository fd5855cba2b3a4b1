"""What a pass learns of the model that it reads: the digest and the sizes that updates are held against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedqsn_cli.kernels.digests import algorithm_of
from fedqsn_cli.kernels.hash_threads import HashQueue
from fedqsn_cli.merging.step.chunks import ModelChunk, visible_rows
from fedqsn_cli.merging.sums import arithmetic
from fedqsn_cli.merging.updates.measures import ModelSizes
from fedqsn_cli.models.digest import ModelHash
from fedqsn_cli.models.tensor_task import TensorTask


class ModelMeasures:
    """Content digest and sizes of what the server does not hide of a model, chunk by chunk.

    Args:
        queue: where the digest is computed.
        released: the digest that it will be compared with, for its algorithm; None where there is none.
    """

    def __init__(self, queue: HashQueue, released: str | None) -> None:
        self.sizes = ModelSizes()
        self._hash = ModelHash(queue, algorithm_of(released))

    def take(self, chunk: ModelChunk, *, copy: bool) -> None:
        """Measure the next chunk.

        Args:
            copy: whether its rows will change before they are hashed.
        """
        task, visible = chunk.task, visible_rows(chunk, copy=copy)
        self._hash.update(task.name, visible)
        if task.tensor.is_float:
            squares = arithmetic.sum_of_squares(visible, task.tensor.dtype)
            self.sizes.add(task, squares, _visible_count(chunk))

    def digest(self, tasks: Sequence[TensorTask]) -> str:
        """Content digest of the model, after all of its tensors, `tasks`, were taken."""
        return self._hash.digest(tasks)


def _visible_count(chunk: ModelChunk) -> int:
    """How many of a chunk's weights the server does not hide."""
    hidden = chunk.task.hidden
    if hidden is None:
        return chunk.values.size
    flags = hidden.flags_of_rows(chunk.first, chunk.rows)
    return chunk.values.size - int(np.count_nonzero(flags)) * (chunk.values.size // max(1, flags.size))
