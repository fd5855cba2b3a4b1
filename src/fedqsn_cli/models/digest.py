"""The content digest of a model."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli import strictjson
from fedqsn_cli.kernels.hash_threads import HashQueue
from fedqsn_cli.models.tensor_task import TensorTask

Array = NDArray[Any]


class ModelHash:
    """Content digest of a model: SHA-256 over its tensors' names, dtypes, shapes and SHA-256, in the order of names.

    Bytes are hashed in a background thread; the caller leaves what it handed over alone until `settle`.
    """

    def __init__(self, queue: HashQueue) -> None:
        self._queue = queue
        self._tensors: dict[str, Any] = {}
        self._pending: deque[Future[None]] = deque()

    def update(self, name: str, values: Array) -> None:
        """More bytes of a tensor, in its own order."""
        sha256 = self._tensors.setdefault(name, hashlib.sha256())
        while len(self._pending) >= 3:
            self._pending.popleft().result()
        self._pending.append(self._queue.submit(sha256.update, values.reshape(-1).view(np.uint8).data))

    def settle(self) -> None:
        """Wait until everything handed over is hashed."""
        while self._pending:
            self._pending.popleft().result()

    def hexdigest(self, tasks: Sequence[TensorTask]) -> str:
        """The digest of all tensors that were handed over."""
        self.settle()
        logical = {task.name: task.tensor for task in tasks}
        lines = [
            strictjson.dumps([name, logical[name].dtype, list(logical[name].shape), sha256.hexdigest()])
            for name, sha256 in sorted(self._tensors.items())
        ]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
