"""Reading an update without trusting it: checked against its proxy's ledger line, the plan and its own digest.

A `ClientUpdate` is what is known before any value is read; an `UpdateReader` reads the values once, checks that they
are finite, and computes the digest of the file and the norm of the client's step on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.artifacts.ledger import Release
from fedqsn_cli.artifacts.manifests import UpdateManifest
from fedqsn_cli.checkpoint.header import FileIdentity
from fedqsn_cli.errors import InputError, RefusedUpdate
from fedqsn_cli.kernels.digests import algorithm_of
from fedqsn_cli.kernels.hash_threads import HashQueue
from fedqsn_cli.masks.job_masks import ClientMasks, VisibleInOrder
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.merging.sums.arithmetic import PieceSquares
from fedqsn_cli.merging.updates.file_hash import FileHash
from fedqsn_cli.merging.updates.measures import UpdateMeasures
from fedqsn_cli.merging.updates.stored_values import ReadValues, TensorValues, UpdateSlice
from fedqsn_cli.models.tensor_task import TensorTask
from fedqsn_cli.planning.tensor_plan import TensorPlan, UnitAxis


@dataclass(frozen=True, slots=True)
class ClientUpdate:
    """One update that passed all checks of names, shapes and origin; its values are checked as they are read.

    Args:
        masks: of its client in its round.
        identities: of the files of tensors, by name, so that another file in the place of one is noticed.
        stored: the U of each float tensor.
        late: how many rounds ago its proxy was made, if that was of an earlier model than the one that is merged into.
    """

    folder: Path
    manifest: UpdateManifest
    release: Release
    masks: ClientMasks
    identities: Mapping[str, FileIdentity]
    stored: Mapping[str, TensorValues]
    late: int = 0

    @property
    def client(self) -> str:
        """Who sent it."""
        return self.release.client

    @property
    def examples(self) -> int:
        """n_k: the number of examples that it was trained on."""
        return self.manifest.num_examples

    @property
    def claims(self) -> tuple[tuple[str, int], ...]:
        """Whose examples these are, and how many."""
        return ((self.client, self.examples),)

    @property
    def round(self) -> int:
        """The round that it answers."""
        return self.release.round

    @property
    def model_digest(self) -> str:
        """Content digest of the model that its proxy was made of."""
        return self.release.model_digest

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


@dataclass(frozen=True, slots=True)
class UpdateChunk:
    """The elements of one update that belong to a chunk of the model, or why they cannot be read."""

    part: UpdateSlice
    found: ReadValues | InputError

    @property
    def read(self) -> ReadValues:
        """The elements. Raises InputError, on behalf of the thread that could not read them."""
        if isinstance(self.found, InputError):
            raise self.found
        return self.found


class UpdateReader:
    """Reads the values of one update once, in the order in which a pass goes through the model.

    Args:
        update: checked by `UpdateVerifier`.
        queue: where the digests of its files are computed.
    """

    def __init__(self, update: ClientUpdate, queue: HashQueue) -> None:
        self.update = update
        self._hashes = {
            name: FileHash(update.folder / name, identity, queue, algorithm_of(update.manifest.files[name]))
            for name, identity in update.identities.items()
        }
        self._visible: tuple[str, UnitMask | VisibleInOrder | None] = ("", None)
        self.measures = UpdateMeasures()

    def prepare(self, task: TensorTask, first: int, rows: int) -> Callable[[], UpdateChunk]:
        """A call that reads the elements that belong to rows `first` .. `first + rows` of a tensor; from any thread."""
        return partial(self._chunk, task.name, self.locate(task, first, rows))

    def _chunk(self, name: str, part: UpdateSlice) -> UpdateChunk:
        try:
            return UpdateChunk(part, self.read(name, part))
        except InputError as error:  # a merge may go on without this update
            return UpdateChunk(part, error)

    def locate(self, task: TensorTask, first: int, rows: int) -> UpdateSlice:
        """The elements of U that belong to the rows that come next of a tensor, `first` .. `first + rows`."""
        if self._visible[0] != task.name:  # one mask at a time, and of single weights only those of the next rows
            self._visible = (task.name, self._mask(task.plan))
        visible, cols = self._visible[1], task.layout.view[2]
        if isinstance(visible, VisibleInOrder):
            begin, index = visible.seen, np.flatnonzero(visible.take(rows * cols))
            return UpdateSlice(first, rows, begin, index.size, index)
        if visible is None:
            return UpdateSlice(first, rows, first * cols, rows * cols, np.empty(0, np.int64))
        return slice_rows(visible, first, rows)

    def _mask(self, tensor: TensorPlan) -> UnitMask | VisibleInOrder | None:
        if self.update.moves_fill:
            return None
        masks = self.update.masks
        single = tensor.masked and tensor.axis == "element"
        return masks.visible_in_order(tensor) if single else masks.visible(tensor)

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


def slice_rows(visible: UnitMask, first: int, rows: int) -> UpdateSlice:
    """The elements of U that belong to rows `first` .. `first + rows` of a tensor."""
    cols = visible.view[2]
    index = np.flatnonzero(visible.flags_of_rows(first, rows).reshape(-1)).astype(np.int64)
    if visible.axis == "row":
        return UpdateSlice(first, rows, int(np.count_nonzero(visible.flags[:first])) * cols, index.size * cols, index)
    begin, end = visible.count_before(np.array([first * cols, (first + rows) * cols], dtype=np.int64))
    return UpdateSlice(first, rows, int(begin), int(end - begin), index)
