"""Reading an update without trusting it: checked against its proxy's ledger line, the plan and its own digest.

A `ClientUpdate` is what is known before any value is read; an `UpdateReader` reads the values once, checks that they
are finite, and computes the digest of the file and the norm of the client's step on the way.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.artifacts import ledger as ledgers
from fedqsn_cli.artifacts.ledger import Release
from fedqsn_cli.artifacts.manifests import (
    ADAPTER_TENSORS,
    UPDATE_MANIFEST,
    UPDATE_TENSORS,
    UpdateManifest,
    read_manifest,
)
from fedqsn_cli.artifacts.update_folder import files_of, format_of, most_header_bytes, require_no_more, update_shape
from fedqsn_cli.checkpoint import read_header
from fedqsn_cli.checkpoint.header import FileIdentity
from fedqsn_cli.checkpoint.reader import DESCRIPTORS, DirectFile
from fedqsn_cli.dtypes import WEIGHT_DTYPES
from fedqsn_cli.errors import RefusedUpdate, SignatureError
from fedqsn_cli.kernels.digests import Algorithm, algorithm_of, new_hash, written
from fedqsn_cli.kernels.hash_threads import HashQueue
from fedqsn_cli.masks.job_key import JobKey
from fedqsn_cli.masks.job_masks import ClientMasks, ServerMasks
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.merging.adapters import AdapterFolder
from fedqsn_cli.merging.arithmetic import PieceSquares
from fedqsn_cli.merging.measures import UpdateMeasures
from fedqsn_cli.merging.refusals import Refusals
from fedqsn_cli.merging.stored_values import ReadValues, StoredValues, TensorValues, UpdateSlice
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.models.tensor_task import TensorTask
from fedqsn_cli.planning.tensor_plan import TensorPlan, UnitAxis

HASH_PIECE = 1 << 22

_COMPARED = {UPDATE_TENSORS, ADAPTER_TENSORS}  # with their digests in update.json, while they are merged


@dataclass(frozen=True, slots=True)
class ClientUpdate:
    """One update that passed all checks of names, shapes and origin; its values are checked as they are read.

    Args:
        masks: of its client in its round.
        identities: of the files of tensors, by name, so that another file in the place of one is noticed.
        stored: the U of each float tensor.
    """

    folder: Path
    manifest: UpdateManifest
    release: Release
    masks: ClientMasks
    identities: Mapping[str, FileIdentity]
    stored: Mapping[str, TensorValues]

    @property
    def client(self) -> str:
        """Who sent it."""
        return self.release.client

    @property
    def examples(self) -> int:
        """n_k: the number of examples that it was trained on."""
        return self.manifest.num_examples

    @property
    def moves_fill(self) -> bool:
        """Whether the client trained the fill of hidden units, too."""
        return self.release.train == "all"

    def axis(self, tensor: TensorPlan) -> UnitAxis | None:
        """The axis along which U has units; None where U holds all elements."""
        return None if self.moves_fill else tensor.axis

    def scale(self, tensor: TensorPlan) -> float:
        """s_k: U divided by it is Δ_k, the step in the model's own coordinates."""
        return float(self.masks.factor(tensor))


class UpdateReader:
    """Reads the values of one update once, in the order in which a pass goes through the model.

    Args:
        update: checked by `open_updates`.
        queue: where the digests of its files are computed.
    """

    def __init__(self, update: ClientUpdate, queue: HashQueue) -> None:
        self.update = update
        self._hashes = {
            name: FileHash(update.folder / name, identity, queue, algorithm_of(update.manifest.files[name]))
            for name, identity in update.identities.items()
        }
        self._visible: tuple[str, UnitMask | None] = ("", None)
        self.measures = UpdateMeasures()

    def locate(self, task: TensorTask, first: int, rows: int) -> UpdateSlice:
        """The elements of U that belong to rows `first` .. `first + rows` of a tensor."""
        if self._visible[0] != task.name:  # one mask at a time: it may be as large as the tensor
            mask = None if self.update.moves_fill else self.update.masks.visible(task.plan)
            self._visible = (task.name, mask)
        visible, cols = self._visible[1], task.layout.view[2]
        if visible is None:
            return UpdateSlice(first, rows, first * cols, rows * cols, np.empty(0, np.int64))
        return slice_rows(visible, first, rows)

    def read(self, name: str, part: UpdateSlice) -> ReadValues:
        """Elements of U, [part.count]; from any thread.

        Raises:
            RefusedUpdate: a code, scale or factor is malformed. FormatError: a file got shorter or changed.
        """
        return self.update.stored[name].read(part, self.read_bytes)

    def read_bytes(self, file: str, start: int, count: int) -> NDArray[np.uint8]:
        """Bytes of a file of the update; from any thread. Raises RefusedUpdate, FormatError: it changed."""
        return self._hashes[file].read(start, count)

    def hash(self, read: ReadValues) -> None:
        """Hash what `read` read; call it in the order of the pass."""
        for piece in read.pieces:
            self._hashes[piece.file].take(piece.start, piece.data)

    def measure(self, tensor: TensorPlan, first: int, sums: PieceSquares, count: int) -> None:
        """Measure a piece of U: `count` numbers, from row `first` on. Raises RefusedUpdate for NaN and infinity."""
        if not math.isfinite(sums.total):
            raise RefusedUpdate("holds NaN or infinity", where=f"{self.update.folder}: {tensor.name}")
        self.measures.add(tensor, first, sums.divided(self.update.scale(tensor)), count, self.update.axis(tensor))

    def finish(self) -> None:
        """Check the digests of the whole files.

        Raises:
            RefusedUpdate: one is not the file that update.json describes.
        """
        for name, digest in self._hashes.items():
            if digest.recorded() != self.update.manifest.files[name]:
                where = self.update.folder / name
                raise RefusedUpdate("its digest is not the one in update.json", where=where, hint="send it again")


class FileHash:
    """Reads pieces of a file and computes the digest of all of it on the way, in a background thread.

    Pieces that are taken in file order are hashed as they were read; what is between them is read for the hash alone.
    """

    def __init__(self, path: Path, identity: FileIdentity, queue: HashQueue, algorithm: Algorithm) -> None:
        self._path = path
        self._identity = identity
        self._direct = DirectFile(path, identity)
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
        """The digest of the whole file, as update.json has it; reads what was not read yet."""
        self._catch_up(self._identity.size)
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
        data = self._direct.read(start, count)
        if data is not None:
            return data
        out = np.empty(count, np.uint8)
        with DESCRIPTORS.borrow(self._path, self._identity) as descriptor:
            done = 0
            while done < count:
                got = os.preadv(descriptor, [out[done:].data], start + done)
                if not got:
                    raise RefusedUpdate("truncated while it was read", where=self._path)
                done += got
        return out


class UpdateVerifier:
    """Accepts updates of one job, released by its ledger, for one model.

    Args:
        job: the job's key. model: what the updates are merged into. ledger: the record of all releases.
        key_of: the public key that the update of a client must be signed with; None where it need not be signed.
    """

    def __init__(
        self, job: JobKey, model: OpenModel, ledger: Path, key_of: Callable[[str], Path | None] = lambda client: None
    ) -> None:
        self.masks = ServerMasks(job)
        self._model = model
        self._ledger = ledger
        self._key_of = key_of
        self._releases = {release.proxy_id: release for release in ledgers.read(ledger, job)}

    def updates(self, folders: Sequence[str | Path], refusals: Refusals) -> list[ClientUpdate]:
        """Open all updates of a round, in the order of client ids: the order of arguments changes nothing.

        Raises:
            RefusedUpdate: one is foreign, stale, duplicate or malformed, or they are of different models, and that is
                not only noted in `refusals`.
        """
        opened = []
        for folder in folders:
            with refusals.noting(folder):
                opened.append(self._open(Path(folder)))
        opened.sort(key=lambda update: update.client)
        last = {update.client: update for update in opened}
        sent = Counter(update.client for update in opened)
        for update in opened:
            with refusals.noting(update.folder, update.client):
                if sent[update.client] > 1:
                    where = last[update.client].folder
                    raise RefusedUpdate(f"client {update.client!r} sent more than one update", where=where)
                if not refusals.skip:  # otherwise the model itself tells which of them are stale
                    self._check_model(update, opened[0])
                self._check_fill(update)
        return refusals.without(opened)

    def _check_model(self, update: ClientUpdate, first: ClientUpdate) -> None:
        if update.release.model_digest != first.release.model_digest:
            raise RefusedUpdate(
                f"it was trained on another model than the update in {first.folder}",
                where=update.folder,
                hint="merge the updates of one round only",
            )

    def _check_fill(self, update: ClientUpdate) -> None:
        if update.moves_fill and self._model.kind != "server-model":
            raise RefusedUpdate(
                "its client trained the public base in the holes, too, and a global model has no holes",
                where=update.folder,
                hint="merge it into the server model; a --restore puts all together",
            )

    def control(self, folder: str | Path, others: Sequence[ClientUpdate]) -> ClientUpdate:
        """Open the control update: verified like any other, of a client whose update is not merged.

        Raises:
            RefusedUpdate: it is refused like any other, is of a client that sent an update, or of another model.
        """
        (control,) = self.updates([folder], Refusals(skip=False, refused=[]))
        for other in others:
            if other.client == control.client:
                raise RefusedUpdate(
                    f"client {control.client!r} sent an update too", where=folder, hint="a control is not merged"
                )
        if control.release.model_digest != others[0].release.model_digest:
            raise RefusedUpdate(
                f"the control was trained on another model than the update in {others[0].folder}",
                where=folder,
                hint="train it on a proxy of the same round",
            )
        return control

    def _open(self, folder: Path) -> ClientUpdate:
        manifest = read_manifest(folder, UpdateManifest)
        require_no_more(folder)
        release = self._releases.get(manifest.proxy_id)
        if release is None:
            raise RefusedUpdate(f"its proxy {manifest.proxy_id[:12]} is not in the ledger {self._ledger}", where=folder)
        if release.proxy_sha256 != manifest.proxy_sha256:
            raise RefusedUpdate("it was trained on another proxy.json than the one released", where=folder)
        if release.job != self.masks.job.commitment or release.plan != self._model.plan.digest:
            raise RefusedUpdate("it belongs to another job or plan", where=folder, hint="check --key")
        if manifest.files.keys() != files_of(manifest):
            names = ", ".join(sorted(files_of(manifest)))
            raise RefusedUpdate(f"it must list exactly {names}", where=folder / UPDATE_MANIFEST)
        self._check_signature(folder, manifest, release.client)
        client = ClientMasks(self.masks, release.client, release.round, release.p2, release.schedule, release.rescale)
        stored, identities = self._values(folder, manifest, client, release)
        return ClientUpdate(folder, manifest, release, client, identities, stored)

    def _values(
        self, folder: Path, manifest: UpdateManifest, client: ClientMasks, release: Release
    ) -> tuple[dict[str, TensorValues], dict[str, FileIdentity]]:
        """The U of each float tensor, and the files that it is in. Raises RefusedUpdate."""
        most = most_header_bytes(self._model.plan.tensors)
        header = read_header(folder / UPDATE_TENSORS, most) if UPDATE_TENSORS in manifest.files else None
        entries, identities = ({}, {}) if header is None else (header.entries, {UPDATE_TENSORS: header.identity})
        adapters = AdapterFolder(folder, manifest, most) if manifest.adapters is not None else None
        stored: dict[str, TensorValues] = {}
        for tensor in self._model.plan.tensors:
            if tensor.dtype in WEIGHT_DTYPES:
                axis = None if release.train is not None else tensor.axis
                values: TensorValues | None = adapters.take(tensor, axis) if adapters is not None else None
                if values is None:
                    shape, kind = _expected_shape(tensor, client, release), format_of(manifest.precision, tensor.shape)
                    values = StoredValues.take(entries, tensor.name, kind, shape, folder)
                stored[tensor.name] = values
        if entries:
            raise RefusedUpdate("the model has no such tensor", where=f"{folder}: {next(iter(entries))}")
        if adapters is not None:
            adapters.finish()
            identities[ADAPTER_TENSORS] = adapters.identity
        return stored, identities

    def _check_signature(self, folder: Path, manifest: UpdateManifest, client: str) -> None:
        """Is it the client who got the proxy that sends the update? Raises RefusedUpdate."""
        public = self._key_of(client)
        if public is None:
            return
        from fedqsn_cli.crypto.keys import load_verify_key
        from fedqsn_cli.crypto.signature import verify_folder

        key = load_verify_key(public)
        listed = {name: manifest.files[name] for name in _COMPARED & manifest.files.keys()}
        known = {name: digest for name, digest in listed.items() if algorithm_of(digest) == "sha256"}
        try:
            verify_folder(folder, key, known)
        except SignatureError as error:
            hint = f"its proxy is that of client {client!r}, who must sign with the key of {public}"
            raise RefusedUpdate(error.what, where=error.where, hint=hint) from None


def _expected_shape(tensor: TensorPlan, client: ClientMasks, release: Release) -> tuple[int, ...]:
    """The shape of U that the release calls for."""
    if release.train is not None:
        return tensor.shape
    return update_shape(tensor.shape, tensor.axis, tensor.view, tensor.view[0] * client.visible_count(tensor))


def slice_rows(visible: UnitMask, first: int, rows: int) -> UpdateSlice:
    """The elements of U that belong to rows `first` .. `first + rows` of a tensor."""
    cols = visible.view[2]
    begin, end = visible.count_before(np.array([first * cols, (first + rows) * cols], dtype=np.int64))
    index = np.flatnonzero(visible.flags_of_rows(first, rows).reshape(-1))
    return UpdateSlice(first, rows, int(begin), int(end - begin), index.astype(np.int64))
