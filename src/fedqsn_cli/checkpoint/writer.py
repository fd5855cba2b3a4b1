"""Writing an artifact: a directory that is complete when it appears, its tensors streamed in any order.

writer = ArtifactWriter(out)          out/ does not exist; .out.fedqsn-…/ is filled
    sink = writer.tensors("model", specs, …)      headers are planned, files are as long as they will be
        sink.write(name, offset, data)
    sink.close()
    writer.add_bytes("config.json", …)
writer.publish()                      one rename: out/ is there, with everything in it
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli import strictjson
from fedqsn_cli.checkpoint import files
from fedqsn_cli.checkpoint.header import TensorSpec, plan_file
from fedqsn_cli.checkpoint.reader import byte_view, is_plain_file_name
from fedqsn_cli.checkpoint.stream import BUFFER_BYTES, FileStream, WriterThreads
from fedqsn_cli.errors import InputError, OutputExists

FILE_MODE, FILE_TIME = 0o644, 315_532_800
"""Mode, and seconds since 1970 of the last change, of every file of a proxy: 1980-01-01, as in reproducible archives.
The owner's umask and clock are nobody's business, and what is the same in all proxies can carry nothing."""

MANIFESTS = ("fedqsn.json", "proxy.json", "update.json")  # a directory that holds one is ours to replace


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


class ArtifactWriter:
    """Stages a directory next to `out` and publishes it with one rename.

    Use as a context manager: whatever was not published when the block ends is deleted.

    Args:
        out: the directory to make; missing parents are made too.
        force: replace an artifact of fedqsn that stands there. Any other directory is never touched.
        pipeline: the background threads, for several writers that are filled at the same time and given up together;
            None for threads of its own.
        hashed: whether `digests` has to tell those of tensor files too; with a given pipeline, that one decides.
        uniform: give every file `FILE_MODE` and `FILE_TIME`. The folder itself follows umask and clock.

    Raises:
        OutputExists: `out` is taken.
        InputError: the place cannot be written.
    """

    def __init__(
        self,
        out: Path,
        *,
        force: bool,
        pipeline: WriterThreads | None = None,
        hashed: bool = True,
        uniform: bool = False,
    ) -> None:
        self.out = Path(os.path.abspath(out))
        self._force = force
        self._uniform = uniform
        if is_artifact(files.aside_path(self.out)):
            files.recover(self.out)
        self._check_out()
        self._new_parents = _make_parents(self.out)
        self._digests: dict[str, str] = {}
        self._sinks: list[TensorSink] = []
        self._shared = pipeline is not None
        self._pipeline = pipeline or WriterThreads(hashed=hashed)
        self._finished = False
        try:
            self._staging, self._lock = files.make_staging_directory(self.out)
        except BaseException:
            _remove_empty(self._new_parents)
            raise

    def _check_out(self) -> None:
        if not os.path.lexists(self.out):
            return
        if not is_artifact(self.out):
            what = "already exists and was not made by fedqsn, so it is never replaced"
            raise OutputExists(what, where=self.out, hint="choose another path")
        if not self._force:
            raise OutputExists("already exists", where=self.out, hint="choose another path, or replace it with --force")

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256, in hex, of each file that is finished; without tensor files if those are not hashed."""
        return dict(self._digests)

    def tensors(
        self,
        stem: str,
        specs: Sequence[TensorSpec],
        *,
        max_shard_bytes: int | None,
        metadata: dict[str, str],
    ) -> TensorSink:
        """Plan `stem`.safetensors, or its shards and their index, and return the sink for their bytes.

        Args:
            stem: "model" makes model.safetensors, or model-00001-of-0000N.safetensors.
            specs: every tensor, in the order in which the bytes will come.
            max_shard_bytes: largest sum of tensor bytes in one file; None for a single file.
            metadata: the `__metadata__` of each file.

        Raises:
            OSError: the disk has no room for that many bytes.
        """
        sink = TensorSink(self, stem, split_into_shards(specs, max_shard_bytes), metadata)
        self._sinks.append(sink)
        return sink

    def add_bytes(self, name: str, data: bytes) -> None:
        """Add a small file.

        Raises:
            OSError: the disk is full or failed.
        """
        self.add_pieces(name, [data])

    def add_file(self, name: str, source: Path) -> None:
        """Add a copy of a regular file; links are followed, never made.

        Raises:
            InputError: the source cannot be read.
            OSError: the disk is full or failed.
        """
        with open(files.open_regular_file(source), "rb") as file:
            self.add_pieces(name, iter(lambda: file.read(BUFFER_BYTES), b""))

    def add_pieces(self, name: str, pieces: Iterable[bytes]) -> None:
        """Add a file that comes in pieces.

        Raises:
            OSError: the disk is full or failed. What `pieces` raises.
        """
        sha256 = hashlib.sha256()
        with open(self.place(name), "xb") as file:
            for piece in pieces:
                sha256.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        self._digests[name] = sha256.hexdigest()

    def place(self, name: str) -> Path:
        """Where a file of that name is staged."""
        if not is_plain_file_name(name) or self._finished:
            raise ValueError(f"{name!r} is no file name, or the artifact is finished")
        return self._staging / name

    def finished(self, stream: FileStream) -> None:
        """Take down the digest of a file that is complete and synced."""
        if self._pipeline.hashed:
            self._digests[stream.path.name] = stream.sha256.hexdigest()

    def file(self, path: Path, size: int) -> FileStream:
        """A file of tensors, written in the background."""
        return FileStream(path, size, self._pipeline)

    def drain(self) -> None:
        """Wait for the disk."""
        self._pipeline.drain()

    def publish(self) -> Path:
        """Give the directory its name: from now on it survives everything, a power cut included.

        Raises:
            OutputExists: something took the path meanwhile.
        """
        if self._finished or not all(sink.closed for sink in self._sinks):
            raise RuntimeError("published twice, or before every sink is closed")
        if not self._shared:
            self._pipeline.stop()
        if self._uniform:
            _make_uniform(self._staging)
        files.sync_directory(self._staging)
        self._check_out()
        if os.path.lexists(self.out):
            self._replace()
        else:
            try:
                files.rename_exclusive(self._staging, self.out)
            except FileExistsError:
                raise OutputExists("appeared while it was being made", where=self.out) from None
        self._finished = True
        files.sync_directory(self.out.parent)
        os.close(self._lock)
        files.remove_tree(self._staging)  # the old artifact, if there was one
        return self.out

    def _replace(self) -> None:
        """Swap places with the old artifact, which is then under the staging name."""
        files.exchange(self._staging, self.out)
        if not is_artifact(self._staging):  # another program put its own directory there at the last instant
            files.exchange(self._staging, self.out)
            raise OutputExists("was replaced while its successor was being made", where=self.out)

    def abort(self) -> None:
        """Delete everything that was staged. After `publish` it does nothing."""
        if self._finished:
            return
        self._finished = True
        self._pipeline.stop()
        for sink in self._sinks:
            sink.discard()
        files.remove_tree(self._staging)
        os.close(self._lock)
        _remove_empty(self._new_parents)

    def __enter__(self) -> ArtifactWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()


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


def _make_uniform(folder: Path) -> None:
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.fchmod(descriptor, FILE_MODE)
            os.utime(descriptor, (FILE_TIME, FILE_TIME))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_artifact(path: Path) -> bool:
    """Whether fedqsn made this directory: a real one that holds one of its manifests."""
    real = os.path.isdir(path) and not os.path.islink(path)  # os.path: False for a name too long, where Path raises
    return real and any(os.path.isfile(path / name) for name in MANIFESTS)


def _make_parents(path: Path) -> list[Path]:
    """Make missing parents; returns them, deepest first."""
    made: list[Path] = []
    try:
        for parent in reversed(path.parents):
            if not parent.exists():
                parent.mkdir(exist_ok=True)
                made.insert(0, parent)
    except OSError as error:
        _remove_empty(made)
        raise InputError(f"cannot make the parent directory ({error.strerror})", where=path) from None
    return made


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
