"""Reading an update without trusting it: checked against its proxy's ledger line, the plan and its own digest.

An update holds U = T − P (trained minus proxy) on the units that the client saw, one tensor for each float tensor:

    axis      stored shape of U
    row       [lead, visible, ...rest], lead only for expert stacks
    column    [lead, rows, visible]
    element   [visible]
    none      the tensor's own shape; so it is for every tensor where clients train the fill, too
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.artifacts.ledger import Release
from fedqsn_cli.artifacts.manifests import UPDATE_MANIFEST, UPDATE_TENSORS, UpdateManifest, read_manifest
from fedqsn_cli.checkpoint import read_header
from fedqsn_cli.checkpoint.header import FileIdentity, TensorEntry
from fedqsn_cli.checkpoint.reader import DESCRIPTORS, ColdFile
from fedqsn_cli.errors import RefusedUpdate
from fedqsn_cli.kernels.hash_threads import HashQueue, HashThreads
from fedqsn_cli.masks.job_masks import ClientMasks, ServerMasks
from fedqsn_cli.masks.unit_mask import Axis, UnitMask
from fedqsn_cli.planning.plan import Plan
from fedqsn_cli.planning.tensor_plan import FLOAT_DTYPES, TensorPlan

Array = NDArray[Any]
DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
BITS: dict[str, type[np.generic]] = {"F32": np.float32, "F16": np.uint16, "BF16": np.uint16}
HASH_PIECE = 1 << 22


@dataclass
class ClientUpdate:
    """One update that passed all checks of names, shapes and origin; its values are checked as they are read.

    Args:
        starts: absolute offset of each float tensor in the file, in the order of their names.
        squares: sum of squares of the client's Δ so far.
    """

    folder: Path
    manifest: UpdateManifest
    release: Release
    masks: ClientMasks
    identity: FileIdentity
    starts: dict[str, int]
    dtype: str
    hash: FileHash
    squares: float = 0.0

    @property
    def client(self) -> str:
        """Who sent it."""
        return self.release.client

    @property
    def moves_fill(self) -> bool:
        """Did the client train what stands in the holes, too?"""
        return self.release.train == "all"

    def axis(self, tensor: TensorPlan) -> Axis | None:
        """Along what the units of U lie; None where U holds all elements."""
        return None if self.moves_fill else tensor.axis

    def visible(self, tensor: TensorPlan) -> UnitMask | None:
        """Which units of a tensor U holds; None for all."""
        return None if self.moves_fill else self.masks.visible(tensor)

    def coefficient(self, tensor: TensorPlan) -> float:
        """n_k / s_k: what U is multiplied by before the sum is divided by the number of examples."""
        return self.manifest.num_examples / float(self.masks.factor(tensor))

    def read(self, name: str, first: int, count: int) -> Array:
        """`count` elements of U from element `first` on, as stored bits [count]; from any thread.

        Raises:
            FormatError: the file got shorter or changed.
        """
        dtype = np.dtype(BITS[self.dtype])
        return self.hash.read(self.starts[name] + first * dtype.itemsize, count * dtype.itemsize).view(dtype)

    def hashed(self, name: str, first: int, values: Array) -> None:
        """Hash what `read` gave, piece by piece in the order in which the model goes by."""
        self.hash.take(self.starts[name] + first * values.itemsize, values.view(np.uint8))

    def finish(self) -> None:
        """Check the digest of the whole file.

        Raises:
            RefusedUpdate: it is not the file that update.json describes.
        """
        if self.hash.hexdigest() != self.manifest.files[UPDATE_TENSORS]:
            raise RefusedUpdate(
                "its sha256 is not the one in update.json", where=self.folder / UPDATE_TENSORS, hint="send it again"
            )


class FileHash:
    """Reads pieces of a file and computes the SHA-256 of all of it on the way, in a background thread.

    Pieces that are taken in file order are hashed as they were read; what lies between them is read for the hash alone.
    """

    def __init__(self, path: Path, identity: FileIdentity, queue: HashQueue) -> None:
        self._path = path
        self._identity = identity
        self._cold = ColdFile(path, identity)
        self._queue = queue
        self._sha256 = hashlib.sha256()
        self._frontier = 0  # every byte before it was handed to the hash
        self._last: Future[None] | None = None

    def take(self, start: int, data: NDArray[np.uint8]) -> None:
        """Hash what was read from absolute offset `start` on, and all before it."""
        self._catch_up(start)
        if start == self._frontier and data.size:
            self._submit(data)

    def hexdigest(self) -> str:
        """SHA-256 of the whole file; reads what was never asked for."""
        self._catch_up(self._identity.size)
        if self._last is not None:
            self._last.result()
        return self._sha256.hexdigest()

    def _catch_up(self, stop: int) -> None:
        while self._frontier < stop:
            self._submit(self.read(self._frontier, min(HASH_PIECE, stop - self._frontier)))

    def _submit(self, data: NDArray[np.uint8]) -> None:
        self._frontier += data.size
        self._last = self._queue.submit(self._sha256.update, data.data)

    def read(self, start: int, count: int) -> NDArray[np.uint8]:
        """`count` bytes from absolute offset `start` on, in a fresh array; from any thread.

        Raises:
            RefusedUpdate: the file got shorter. FormatError: it is another one now.
        """
        found = self._cold.read(start, count)
        if found is not None:
            return found
        out = np.empty(count, np.uint8)
        with DESCRIPTORS.borrow(self._path, self._identity) as descriptor:
            done = 0
            while done < count:
                got = os.preadv(descriptor, [out[done:].data], start + done)
                if not got:
                    raise RefusedUpdate("truncated while it was read", where=self._path)
                done += got
        return out


def open_updates(
    folders: Sequence[Path],
    *,
    masks: ServerMasks,
    plan: Plan,
    releases: Mapping[str, Release],
    ledger: Path,
    max_examples: int | None,
    hashing: HashThreads,
) -> list[ClientUpdate]:
    """Open all updates of a round, in the order of client ids, so that the order of arguments changes nothing.

    Raises:
        RefusedUpdate: one is foreign, stale, doubled or malformed, or they are of different models.
    """
    opened = [_open(folder, masks, plan, releases, ledger, max_examples, hashing) for folder in folders]
    opened.sort(key=lambda update: update.client)
    for before, after in zip(opened, opened[1:], strict=False):
        if before.client == after.client:
            raise RefusedUpdate(f"client {after.client!r} sent more than one update", where=after.folder)
    for update in opened:
        if update.release.model_digest != opened[0].release.model_digest:
            raise RefusedUpdate(
                f"it was trained on another model than the update in {opened[0].folder}",
                where=update.folder,
                hint="merge the updates of one round only",
            )
    return opened


def _open(
    folder: Path,
    masks: ServerMasks,
    plan: Plan,
    releases: Mapping[str, Release],
    ledger: Path,
    max_examples: int | None,
    hashing: HashThreads,
) -> ClientUpdate:
    manifest = read_manifest(folder, UpdateManifest)
    release = releases.get(manifest.proxy_id)
    if release is None:
        raise RefusedUpdate(f"its proxy {manifest.proxy_id[:12]} is not in the ledger {ledger}", where=folder)
    if release.proxy_sha256 != manifest.proxy_sha256:
        raise RefusedUpdate("it was trained on another proxy.json than the one released", where=folder)
    if release.job != masks.job.commitment or release.plan != plan.digest:
        raise RefusedUpdate("it belongs to another job or plan", where=folder, hint="check --key")
    if manifest.files.keys() != {UPDATE_TENSORS}:
        raise RefusedUpdate(f"it must list exactly {UPDATE_TENSORS}", where=folder / UPDATE_MANIFEST)
    if max_examples is not None and manifest.num_examples > max_examples:
        raise RefusedUpdate(
            f"it claims {manifest.num_examples} examples, more than --max-examples {max_examples}", where=folder
        )
    client = ClientMasks(masks, release.client, release.round, release.p2, release.schedule, release.rescale)
    header = read_header(folder / UPDATE_TENSORS)
    dtype = DTYPES[manifest.precision]
    starts = {}
    for tensor in plan.tensors:
        if tensor.dtype in FLOAT_DTYPES:
            shape = tensor.shape
            if release.train is None:
                shape = update_shape(tensor, client.visible_count(tensor))
            starts[tensor.name] = _checked(header.entries.pop(tensor.name, None), tensor, shape, dtype, folder)
    if header.entries:
        raise RefusedUpdate("the model has no such tensor", where=f"{folder}: {next(iter(header.entries))}")
    path = folder / UPDATE_TENSORS
    hasher = FileHash(path, header.identity, hashing.queue())
    return ClientUpdate(folder, manifest, release, client, header.identity, starts, dtype, hasher)


def _checked(entry: TensorEntry | None, tensor: TensorPlan, shape: tuple[int, ...], dtype: str, folder: Path) -> int:
    """The start of a tensor whose dtype and shape are what the release makes them."""
    where = f"{folder}: {tensor.name}"
    if entry is None:
        raise RefusedUpdate("the tensor is missing", where=where)
    if entry.dtype != dtype or entry.shape != shape:
        raise RefusedUpdate(f"expected {dtype} {list(shape)}, found {entry.dtype} {list(entry.shape)}", where=where)
    return entry.start


def update_shape(tensor: TensorPlan, visible: int) -> tuple[int, ...]:
    """Shape of U for a tensor of which `visible` units are seen (table above)."""
    lead, rows, cols = tensor.view
    if tensor.axis is None:
        return tensor.shape
    if tensor.axis == "element":
        return (lead * visible,)
    head = (lead,) if len(tensor.shape) == 3 or (tensor.role == "bias" and len(tensor.shape) == 2) else ()
    if tensor.role == "bias":
        return (*head, visible)
    return (*head, visible, cols) if tensor.axis == "row" else (*head, rows, visible)


@dataclass(frozen=True, slots=True)
class Rows:
    """Which elements of U belong to a run of rows, and where they go.

    Args:
        first, count: the elements of U.
        index: flat positions within the run of rows of the first element of each seen unit (row), seen column numbers
            (column), or flat positions of elements (element).
    """

    first: int
    count: int
    index: NDArray[np.int64]


def rows_of(visible: UnitMask, first: int, rows: int) -> Rows:
    """Where rows `first` .. `first + rows` of a tensor lie in U."""
    cols = visible.view[2]
    begin, end = visible.count_before(np.array([first * cols, (first + rows) * cols], dtype=np.int64))
    index = np.flatnonzero(visible.flags_of_rows(first, rows).reshape(-1))
    return Rows(int(begin), int(end - begin), index.astype(np.int64))
