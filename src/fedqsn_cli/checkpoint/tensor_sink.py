"""The tensors of a folder on their way into files: headers are planned, shards cut, bytes come in any order."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli import strictjson
from fedqsn_cli.checkpoint.header import TensorSpec, plan_file
from fedqsn_cli.checkpoint.reader import byte_view


class TensorFile(Protocol):
    """One file of tensors that takes its bytes in any order: `FileStream`, or what compares them with a file."""

    path: Path

    def create(self) -> None:
        """Prepare for the first byte."""

    @property
    def complete(self) -> bool:
        """Whether every byte was written."""

    def write(self, offset: int, data: memoryview) -> None:
        """Take the bytes [offset, offset + len(data)) of the file."""

    def close(self) -> None:
        """Give the file up."""


class FolderWriter(Protocol):
    """Takes the files of a proxy: `ArtifactWriter`, or what compares them with those of a folder."""

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256, in hex, of each file that is finished."""

    def tensors(
        self, stem: str, specs: Sequence[TensorSpec], *, max_shard_bytes: int | None, metadata: dict[str, str]
    ) -> TensorSink:
        """Plan files of tensors, and return the sink for their bytes."""

    def add_bytes(self, name: str, data: bytes) -> None:
        """Add a small file."""

    def place(self, name: str) -> Path:
        """Where a file of that name is."""

    def file(self, path: Path, size: int) -> TensorFile:
        """A file of tensors there."""

    def drain(self) -> None:
        """Wait until every byte of all files is where it belongs."""

    def finished(self, file: Any) -> None:
        """A file of tensors is complete."""


class TensorSink:
    """Takes the bytes of planned tensors, in any order and from any thread, each byte exactly once.

    Fast when they come in the order of the specs. The caller may use its buffer again when `write` returns.
    """

    def __init__(
        self, writer: FolderWriter, stem: str, shards: list[list[TensorSpec]], metadata: dict[str, str]
    ) -> None:
        self._writer = writer
        self._lock = threading.Lock()
        self._streams: list[TensorFile] = []
        self._places: dict[str, tuple[TensorFile, int, int]] = {}  # name -> file, absolute start, nbytes
        self._headers: dict[Path, bytes] = {}
        self._index: tuple[str, bytes] | None = None
        self.closed = False
        weight_map: dict[str, str] = {}
        for number, specs in enumerate(shards, 1):  # all before the first file is made
            suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            path = writer.place(f"{stem}{suffix}.safetensors")
            self._plan(path, specs, metadata)
            weight_map |= {spec.name: path.name for spec in specs}
        if len(weight_map) != sum(map(len, shards)):
            raise ValueError("a tensor is given twice")
        if len(shards) > 1:
            size = sum(nbytes for _, _, nbytes in self._places.values())
            document = {"metadata": {"total_size": size}, "weight_map": weight_map}
            self._index = f"{stem}.safetensors.index.json", strictjson.pretty(document).encode()
        for stream in self._streams:
            stream.create()

    def _plan(self, path: Path, specs: list[TensorSpec], metadata: dict[str, str]) -> None:
        header, starts = plan_file(specs, metadata)
        stream = self._writer.file(path, len(header) + sum(spec.nbytes for spec in specs))
        self._streams.append(stream)
        self._headers[path] = header
        for spec in specs:
            self._places[spec.name] = stream, starts[spec.name], spec.nbytes

    def write(self, name: str, offset: int, data: NDArray[Any] | bytes | memoryview) -> None:
        """Write the bytes [offset, offset + size of data) of a tensor; waits when the disk cannot follow.

        Raises:
            RuntimeError: bytes outside of the tensor, or written before (a bug in the caller).
            OSError: this or an earlier write failed, for example on a full disk.
        """
        view = byte_view(np.ascontiguousarray(data) if isinstance(data, np.ndarray) else data)
        with self._lock:
            if self.closed:
                raise RuntimeError(f"{name}: written after close")
            stream, start, nbytes = self._places[name]
            if offset < 0 or offset + len(view) > nbytes:
                raise RuntimeError(f"{name}: bytes [{offset}, {offset + len(view)}) of {nbytes}")
            if len(view):
                self._begin(stream)
                stream.write(start + offset, view)

    def _begin(self, stream: TensorFile) -> None:
        header = self._headers.pop(stream.path, None)
        if header is not None:
            stream.write(0, memoryview(header))

    def close(self) -> None:
        """Wait for the disk, then write the index.

        Raises:
            RuntimeError: a byte of a tensor was never written (a bug in the caller).
            OSError: an earlier write failed.
        """
        with self._lock:
            for stream in self._streams:
                self._begin(stream)  # a file of nothing but empty tensors
                if not stream.complete:
                    raise RuntimeError(f"{stream.path.name}: bytes are missing")
            self._writer.drain()
            for stream in self._streams:
                self._writer.finished(stream)
            self.closed = True
            self._places = {}  # one of a thousand sinks, perhaps
        if self._index:
            self._writer.add_bytes(*self._index)

    def discard(self) -> None:
        """Close the files of an artifact that is given up."""
        with self._lock:
            self.closed = True
            for stream in self._streams:
                stream.close()


def split_into_shards(specs: Sequence[TensorSpec], max_shard_bytes: int | None) -> list[list[TensorSpec]]:
    """Cut tensors into files as huggingface_hub does: greedily, a tensor over the limit alone in its own file."""
    if max_shard_bytes is None:
        return [list(specs)]
    shards: list[list[TensorSpec]] = []
    current: list[TensorSpec] = []
    size = 0
    for spec in specs:
        if spec.nbytes > max_shard_bytes:
            shards.append([spec])
            continue
        if size + spec.nbytes > max_shard_bytes:
            shards.append(current)
            current, size = [], 0
        current.append(spec)
        size += spec.nbytes
    return shards + [current] if current else shards
