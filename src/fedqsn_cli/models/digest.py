"""The content digest of a model.

    BLAKE3 over a line for each tensor: its name, dtype, shape and BLAKE3, in the order of names

Jobs of earlier versions go on with theirs, which is SHA-256 throughout.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli import strictjson
from fedqsn_cli.kernels.digests import Algorithm, Hash, new_hash, written
from fedqsn_cli.kernels.hash_threads import HashQueue
from fedqsn_cli.models.tensor_task import TensorTask

Array = NDArray[Any]


class ModelHash:
    """Computes the content digest of a model.

    Bytes are hashed in a background thread; the caller leaves what it handed over alone until `settle`.
    """

    def __init__(self, queue: HashQueue, algorithm: Algorithm) -> None:
        self._queue = queue
        self._algorithm = algorithm
        self._tensors: dict[str, Hash] = {}
        self._pending: deque[Future[None]] = deque()

    def update(self, name: str, values: Array) -> None:
        """More bytes of a tensor, in its own order."""
        if name not in self._tensors:
            self._tensors[name] = new_hash(self._algorithm)
        while len(self._pending) >= 3:
            self._pending.popleft().result()
        self._pending.append(self._queue.submit(self._tensors[name].update, values.reshape(-1).view(np.uint8).data))

    def settle(self) -> None:
        """Wait until everything handed over is hashed."""
        while self._pending:
            self._pending.popleft().result()

    def digest(self, tasks: Sequence[TensorTask]) -> str:
        """The digest of all tensors that were handed over."""
        self.settle()
        logical = {task.name: task.tensor for task in tasks}
        lines = [
            strictjson.dumps([name, logical[name].dtype, list(logical[name].shape), tensor.hexdigest()])
            for name, tensor in sorted(self._tensors.items())
        ]
        whole = new_hash(self._algorithm)
        whole.update("\n".join(lines).encode())
        return written(self._algorithm, whole)
