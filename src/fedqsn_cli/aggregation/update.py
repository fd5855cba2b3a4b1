"""Reading an update without trusting it: checked against its proxy's ledger line, the plan and its own digest.

An update holds U = T − P (trained minus proxy) on the units that the client saw, one tensor for each float tensor:

    axis      stored shape of U
    row       [lead, visible, ...rest], lead only for expert stacks
    column    [lead, rows, visible]
    element   [visible]
    none      the tensor's own shape
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.artifacts import UPDATE_MANIFEST, UPDATE_TENSORS, UpdateManifest, read_manifest
from fedqsn_cli.checkpoint import read_header
from fedqsn_cli.checkpoint.header import FileIdentity, TensorEntry
from fedqsn_cli.checkpoint.reader import DESCRIPTORS, byte_view
from fedqsn_cli.errors import RefusedUpdate
from fedqsn_cli.jobmasks import ClientMasks, ServerMasks
from fedqsn_cli.ledger import Release
from fedqsn_cli.masking import hidden_count
from fedqsn_cli.plan import FLOAT_DTYPES, Plan, TensorPlan
from fedqsn_cli.units import UnitMask

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

    def coefficient(self, tensor: TensorPlan) -> float:
        """n_k / s_k: what U is multiplied by before the sum is divided by the number of examples."""
        return self.manifest.num_examples / float(self.masks.factor(tensor))

    def read(self, name: str, first: int, count: int) -> Array:
        """`count` elements of U from element `first` on, as stored bits [count].

        Raises:
            FormatError: the file got shorter or changed.
        """
        out = np.empty(count, BITS[self.dtype])
        start = self.starts[name] + first * out.itemsize
        self.hash.read(start, byte_view(out))
        return out

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

    Pieces that come in file order are hashed as they are read; what lies between them is read for the hash alone.
    """

    def __init__(self, path: Path, identity: FileIdentity, executor: Executor) -> None:
        self._path = path
        self._identity = identity
        self._executor = executor
        self._sha256 = hashlib.sha256()
        self._frontier = 0  # every byte before it was handed to the hash
        self._pending: list[Future[None]] = []

    def read(self, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes from absolute offset `start` on."""
        self._catch_up(start)
        self._fill(start, out)
        if start == self._frontier and len(out):
            self._frontier += len(out)
            self._submit(out)

    def hexdigest(self) -> str:
        """SHA-256 of the whole file; reads what was never asked for."""
        self._catch_up(self._identity.size)
        for future in self._pending:
            future.result()
        return self._sha256.hexdigest()

    def _catch_up(self, stop: int) -> None:
        while self._frontier < stop:
            piece = memoryview(bytearray(min(HASH_PIECE, stop - self._frontier)))
            self._fill(self._frontier, piece)
            self._frontier += len(piece)
            self._submit(piece)

    def _submit(self, piece: memoryview) -> None:
        while len(self._pending) >= 2:
            self._pending.pop(0).result()
        self._pending.append(self._executor.submit(self._sha256.update, piece))

    def _fill(self, start: int, out: memoryview) -> None:
        with DESCRIPTORS.borrow(self._path, self._identity) as descriptor:
            while len(out):
                count = os.preadv(descriptor, [out], start)
                if not count:
                    raise RefusedUpdate("truncated while it was read", where=self._path)
                start, out = start + count, out[count:]


def open_updates(
    folders: Sequence[Path],
    *,
    masks: ServerMasks,
    plan: Plan,
    releases: Mapping[str, Release],
    ledger: Path,
    max_examples: int | None,
    executor: Executor,
) -> list[ClientUpdate]:
    """Open all updates of a round, in the order of client ids, so that the order of arguments changes nothing.

    Raises:
        RefusedUpdate: one is foreign, stale, doubled or malformed, or they are of different models.
    """
    opened = [_open(folder, masks, plan, releases, ledger, max_examples, executor) for folder in folders]
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
    executor: Executor,
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
            starts[tensor.name] = _checked(header.entries.pop(tensor.name, None), tensor, client, dtype, folder)
    if header.entries:
        raise RefusedUpdate("the model has no such tensor", where=f"{folder}: {next(iter(header.entries))}")
    path = folder / UPDATE_TENSORS
    hasher = FileHash(path, header.identity, executor)
    return ClientUpdate(folder, manifest, release, client, header.identity, starts, dtype, hasher)


def _checked(entry: TensorEntry | None, tensor: TensorPlan, masks: ClientMasks, dtype: str, folder: Path) -> int:
    """The start of a tensor whose dtype and shape are what the release makes them."""
    where = f"{folder}: {tensor.name}"
    if entry is None:
        raise RefusedUpdate("the tensor is missing", where=where)
    shape = update_shape(tensor, visible_units(tensor, masks.server.job.p1, masks.p2))
    if entry.dtype != dtype or entry.shape != shape:
        raise RefusedUpdate(f"expected {dtype} {list(shape)}, found {entry.dtype} {list(entry.shape)}", where=where)
    return entry.start


def visible_units(tensor: TensorPlan, p1: float, p2: float) -> int:
    """|V|: how many units of each group of a tensor a client sees."""
    by_server = hidden_count(tensor.units, p1)
    return tensor.units - by_server - hidden_count(tensor.units - by_server, p2)


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
    index = np.flatnonzero(visible.of_rows(first, rows).reshape(-1))
    return Rows(int(begin), int(end - begin), index.astype(np.int64))
