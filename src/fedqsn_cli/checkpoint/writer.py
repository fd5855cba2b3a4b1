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
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from fedqsn_cli.checkpoint import files
from fedqsn_cli.checkpoint.companions import MANIFESTS
from fedqsn_cli.checkpoint.header import TensorSpec, is_plain_file_name
from fedqsn_cli.checkpoint.in_order import InOrderWriter
from fedqsn_cli.checkpoint.stream import BUFFER_BYTES, FileStream, WriterThreads
from fedqsn_cli.checkpoint.tensor_sink import TensorSink, split_into_shards
from fedqsn_cli.errors import InputError, OutputExists
from fedqsn_cli.kernels.digests import Algorithm, written

FILE_MODE, FILE_TIME = 0o644, 315_532_800
"""Mode of every file of a proxy, and seconds since 1970 of its last change and of the folder's: 1980-01-01, as in
reproducible archives. They tell nothing about the owner's clock, and what is the same in all proxies can carry nothing.
"""


class ArtifactWriter:
    """Stages a directory next to `out` and publishes it with one rename.

    Use as a context manager: whatever was not published when the block ends is deleted.

    Args:
        out: the directory to make; missing parents are made too.
        force: replace an artifact of fedqsn that is there. Any other directory is never touched.
        replaces: the manifests that such an artifact may have, so that no input is lost to an output of another kind.
        pipeline: the background threads, for several writers that are filled at the same time and given up together;
            None for threads of its own.
        digest: how `digests` tells those of tensor files; None if it need not. A given pipeline decides for itself.
        uniform: give every file `FILE_MODE`, and them and the folder `FILE_TIME`. The folder's mode follows the umask:
            it alone keeps other users out.

    Raises:
        OutputExists: `out` is taken.
        InputError: the place cannot be written.
    """

    def __init__(
        self,
        out: Path,
        *,
        force: bool,
        replaces: Collection[str] = MANIFESTS,
        pipeline: WriterThreads | None = None,
        digest: Algorithm | None = "sha256",
        uniform: bool = False,
    ) -> None:
        self.out = Path(os.path.abspath(out))
        self._force = force
        self._replaces = replaces
        self._uniform = uniform
        if self.out.name and is_artifact(files.aside_path(self.out)):  # the root folder has no name
            files.recover(self.out)
        self._check_out()
        self._new_parents = _make_parents(self.out)
        self._digests: dict[str, str] = {}
        self._sinks: list[TensorSink] = []
        self._shared = pipeline is not None
        self._pipeline = pipeline or WriterThreads(digest=digest)
        self._finished = False
        try:
            self._staging, self._lock = files.make_staging_directory(self.out)
        except BaseException:
            _remove_empty(self._new_parents)
            raise

    def _check_out(self) -> None:
        if not os.path.lexists(self.out):
            return
        what = None
        if not is_artifact(self.out):
            what = "already exists and was not made by fedqsn, so it is never replaced"
        elif not is_artifact(self.out, self._replaces):
            what = f"already exists, and is another kind of output: it has no {' or '.join(self._replaces)}"
        if what is not None:
            raise OutputExists(what, where=self.out, hint="choose another path")
        if not self._force:
            raise OutputExists("already exists", where=self.out, hint="choose another path, or replace it with --force")

    @property
    def digests(self) -> dict[str, str]:
        """The recorded digest of each file that is finished: SHA-256, of tensor files as asked for."""
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

    def add_pieces(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        """Add a file that comes in pieces.

        Raises:
            OSError: the disk is full or failed. What `pieces` raises.
        """
        sha256 = hashlib.sha256()
        with open(self.place(name), "xb", buffering=0) as file:
            writer = InOrderWriter(file.fileno())
            for piece in pieces:
                sha256.update(piece)
                writer.write(piece)
            writer.finish()
            os.fsync(file.fileno())
        self._digests[name] = sha256.hexdigest()

    def place(self, name: str) -> Path:
        """Where a file of that name is staged."""
        if not is_plain_file_name(name) or self._finished:
            raise ValueError(f"{name!r} is not a file name, or the artifact is finished")
        return self._staging / name

    def finished(self, stream: FileStream) -> None:
        """Take down the digest of a file that is complete and synced."""
        if self._pipeline.digest is not None and stream.digest is not None:
            self._digests[stream.path.name] = written(self._pipeline.digest, stream.digest)

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


def _make_uniform(folder: Path) -> None:
    """The folder comes last: nothing may be made in it after that."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if path != folder:
                os.fchmod(descriptor, FILE_MODE)
            os.utime(descriptor, (FILE_TIME, FILE_TIME))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_artifact(path: Path, manifests: Collection[str] = MANIFESTS) -> bool:
    """Whether fedqsn made this directory: a real one that holds one of its manifests."""
    real = os.path.isdir(path) and not os.path.islink(path)  # os.path: False for a name too long, where Path raises
    return real and any(os.path.isfile(path / name) for name in manifests)


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
