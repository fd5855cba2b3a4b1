"""A file that is read in pieces, and its digest on the way."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.checkpoint.descriptors import StoredFile
from fedqsn_cli.checkpoint.header import FileIdentity
from fedqsn_cli.errors import RefusedUpdate
from fedqsn_cli.kernels.digests import Algorithm, new_hash, written
from fedqsn_cli.kernels.hash_threads import HashQueue

HASH_PIECE = 1 << 22


class FileHash:
    """Reads pieces of a file and computes the digest of all of it on the way, in a background thread.

    Pieces that are taken in file order are hashed as they were read; what is between them is read for the hash alone.
    """

    def __init__(self, path: Path, identity: FileIdentity, queue: HashQueue, algorithm: Algorithm) -> None:
        self._file = StoredFile(path, identity)
        self._queue = queue
        self._algorithm = algorithm
        self._digest = new_hash(algorithm)
        self._submitted = 0  # bytes handed to the hash: all before this offset
        self._last: Future[None] | None = None

    def take(self, start: int, data: NDArray[np.uint8]) -> None:
        """Hash what was read from absolute offset `start` on, except for what was hashed before, and all before it."""
        self._catch_up(start)
        known = self._submitted - start
        if known < data.size:
            self._submit(data[known:])

    def recorded(self) -> str:
        """The digest of the whole file, as manifests have it; reads what was not read yet."""
        self._catch_up(self._file.identity.size)
        if self._last is not None:
            self._last.result()
        return written(self._algorithm, self._digest)

    def _catch_up(self, stop: int) -> None:
        while self._submitted < stop:
            self._submit(self.read(self._submitted, min(HASH_PIECE, stop - self._submitted)))

    def _submit(self, data: NDArray[np.uint8]) -> None:
        self._submitted += data.size
        self._last = self._queue.submit(self._digest.update, data.data)

    def read(self, start: int, count: int) -> NDArray[np.uint8]:
        """`count` bytes from absolute offset `start` on, in a fresh array; from any thread.

        Raises:
            RefusedUpdate: the file got shorter. FormatError: it is another one now.
        """
        data = self._file.read(start, count)
        if data.size < count:
            raise RefusedUpdate("truncated while it was read", where=self._file.path)
        return data
