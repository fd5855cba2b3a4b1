"""The pass of a merge: one chunk of the model, then the same rows of every update, then those of a control update.

Whoever takes the result sees stored bits, chunk by chunk: files on their way to the disk, or tensors held in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.checkpoint import TensorSpec
from fedqsn_cli.errors import RefusedUpdate
from fedqsn_cli.kernels.hash_threads import HashThreads
from fedqsn_cli.kernels.read_ahead import read_ahead
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.merging import accumulate
from fedqsn_cli.merging.read_update import ClientUpdate, Rows, rows_of
from fedqsn_cli.models.digest import ModelHash
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.models.residual import Residual
from fedqsn_cli.models.tensor_task import TensorTask
from fedqsn_cli.options.merge import Normalize
from fedqsn_cli.planning.tensor_plan import TensorPlan
from fedqsn_cli.progress import Progress
from fedqsn_cli.quantization.layout import row_chunks

CHUNK_ELEMENTS = 1 << 20  # its double-precision sum takes 8 MiB
READERS = 3  # pieces that are read at once, from one file each perhaps: the disk is never without an order

Array = NDArray[Any]


class Sink(Protocol):
    """Takes the bytes of tensors, chunk by chunk."""

    def write(self, name: str, offset: int, data: Array) -> None:
        """The bytes from `offset` on of a tensor."""


class Held:
    """Tensors in memory, filled like a file."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self.specs = {spec.name: spec for spec in specs}
        self.bytes = {spec.name: np.empty(spec.nbytes, np.uint8) for spec in specs}

    def write(self, name: str, offset: int, data: Array) -> None:
        """The bytes from `offset` on of a tensor."""
        view = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        self.bytes[name][offset : offset + view.size] = view


End = tuple[Held, Held]  # weights as they are stored, and the residual of 16-bit weights that have one


@dataclass(frozen=True, slots=True)
class _Piece:
    """What was read for a chunk: the model's own rows (client None), or the rows of one update."""

    task: TensorTask
    first: int
    rows: int
    values: Array
    residual: Array | None
    update: ClientUpdate | None
    seen: Rows | None
    last: bool  # nothing more comes for this chunk


class Merger:
    """Reads the model and all updates in step, and keeps the sum of the chunk that is going by.

    Args:
        normalize: average each unit over the clients that saw it, or over all. rate: η.
        control: an update of the owner's own, of which `control_weight` is taken off what clients brought.
    """

    def __init__(
        self,
        model: OpenModel,
        updates: Sequence[ClientUpdate],
        normalize: Normalize,
        rate: float,
        hashing: HashThreads,
        control: ClientUpdate | None = None,
        control_weight: float = 1.0,
    ) -> None:
        self.model = model
        self.updates = updates
        self.control = control
        self.examples = sum(update.manifest.num_examples for update in updates)
        self.squares = 0.0  # of the server-visible weights
        self.before = ModelHash(hashing.queue())
        self.after = ModelHash(hashing.queue()) if model.kind == "server-model" else None
        self.covered = 0
        self._normalize = normalize
        self._rate = rate
        self._control_weight = control_weight
        self._residual = Residual(model)
        self._visible: tuple[str, dict[str, UnitMask | None]] = ("", {})
        self._sums = np.empty(0)
        self._total: NDArray[np.float64] = np.empty((0, 0))
        self._weights = np.empty(0)
        self._drifts = np.empty(0)

    def pieces(self, tasks: Sequence[TensorTask]) -> Iterator[Callable[[], _Piece]]:
        """Everything there is to read, in the order in which it is needed, as calls that read it."""
        sent = [*self.updates, *([self.control] if self.control else [])]
        for task in tasks:
            trained = task.tensor.is_float
            for first, rows in row_chunks(task.layout, 1, CHUNK_ELEMENTS):
                yield partial(self._own, task, first, rows, last=not trained)
                for update in sent if trained else ():
                    seen = self._seen(task, first, rows, update)
                    yield partial(self._sent, task, first, rows, update, seen, last=update is sent[-1])

    def _own(self, task: TensorTask, first: int, rows: int, *, last: bool) -> _Piece:
        values = self.model.read_rows(task.name, task.layout, first, rows)
        residual = None
        if task.tensor.dtype in {"F16", "BF16"}:
            residual = self._residual.rows(task.name, first, rows, task.layout.view[2])
        return _Piece(task, first, rows, values, residual, None, None, last)

    @staticmethod
    def _sent(task: TensorTask, first: int, rows: int, update: ClientUpdate, seen: Rows, *, last: bool) -> _Piece:
        values = update.read(task.name, seen.first, seen.count)
        return _Piece(task, first, rows, values, None, update, seen, last)

    def _seen(self, task: TensorTask, first: int, rows: int, update: ClientUpdate) -> Rows:
        """Where these rows lie in U."""
        visible = self._mask(task, update)
        cols = task.layout.view[2]
        return rows_of(visible, first, rows) if visible else Rows(first * cols, rows * cols, np.empty(0, np.int64))

    def _mask(self, task: TensorTask, update: ClientUpdate) -> UnitMask | None:
        """What the client saw of the tensor; kept while the tensor goes by."""
        if self._visible[0] != task.name:
            self._visible = (task.name, {})
        masks = self._visible[1]
        if update.client not in masks:
            masks[update.client] = update.visible(task.plan)
        return masks[update.client]

    def begin(self, piece: _Piece) -> None:
        """Start a chunk with the model's own rows: check, hash, and clear the sum."""
        task = piece.task
        visible = piece.values.copy()  # the rows themselves will move while these are hashed
        if task.hidden is not None:
            task.hidden.overwrite(visible, piece.first, None)
        self.before.update(task.name, visible)
        if task.tensor.is_float:
            self.squares += accumulate.sum_of_squares(visible, task.tensor.dtype)
            if self._sums.size < visible.size:
                self._sums = np.empty(visible.size)
            self._total = self._sums[: visible.size].reshape(visible.shape)
            self._total[:] = 0
            units = {None: 1, "row": piece.rows, "column": visible.shape[1], "element": visible.size}
            self._weights = np.zeros(units[task.plan.axis])

    def add(self, piece: _Piece) -> None:
        """Add one client's rows to the sum."""
        update, seen = piece.update, piece.seen
        assert update is not None and seen is not None
        tensor = piece.task.plan
        axis, coefficient = update.axis(tensor), update.coefficient(tensor)
        squares = accumulate.add(self._total, piece.values, update.dtype, seen.index, axis, coefficient)
        _measure(update, tensor, squares)
        self._weights[seen.index if axis else slice(None)] += update.manifest.num_examples

    def subtract(self, piece: _Piece) -> None:
        """Take the control update off the sum: its step on every unit, times the examples of those who saw the unit."""
        update, seen = piece.update, piece.seen
        assert update is not None and seen is not None
        tensor = piece.task.plan
        if self._drifts.size < self._total.size:
            self._drifts = np.empty(self._total.size)
        drift = self._drifts[: self._total.size].reshape(self._total.shape)
        drift[:] = 0
        coefficient = 1.0 / float(update.masks.factor(tensor))
        squares = accumulate.add(drift, piece.values, update.dtype, seen.index, update.axis(tensor), coefficient)
        _measure(update, tensor, squares)
        accumulate.subtract(self._total, drift, self._weights, tensor.axis, self._control_weight)

    def step(self, own: _Piece) -> None:
        """Move the model's rows in place."""
        task = own.task
        weights = self._weights
        self.covered += int(np.count_nonzero(weights)) * (own.values.size // max(1, weights.size))
        if self._normalize == "clients":
            weights = np.where(weights > 0, float(self.examples), 0.0)
        bad = accumulate.step(
            own.values, own.residual, task.tensor.dtype, self._total, weights, task.plan.axis, self._rate
        )
        if bad:
            raise RefusedUpdate(
                f"the merged tensor would hold {bad} infinite or NaN values",
                where=task.name,
                hint="an update is poisoned, or --server-lr is too large",
            )

    def end(self, own: _Piece) -> None:
        """Hash the new rows as the next export will, where the manifest tells their digest."""
        if self.after is None:
            return
        visible = own.values
        if own.task.hidden is not None:
            visible = own.values.copy()
            own.task.hidden.overwrite(visible, own.first, None)
        self.after.update(own.task.name, visible)


def _measure(update: ClientUpdate, tensor: TensorPlan, squares: float) -> None:
    """Add the squares of U to those of the client's Δ. Raises RefusedUpdate for NaN and infinity."""
    if not math.isfinite(squares):
        raise RefusedUpdate("holds NaN or infinity", where=f"{update.folder}: {tensor.name}")
    update.squares += squares / float(update.masks.factor(tensor)) ** 2


def stream(
    merger: Merger, tasks: Sequence[TensorTask], sink: Sink, rest: Sink | None, progress: Progress
) -> str | None:
    """Send the model through the merger into sinks for weights and residual; the digest of a new server model.

    Raises:
        RefusedUpdate: an update is not finite, or what comes out is not. What can only be known once everything went
            by (digests, norms) is not checked here.
    """
    progress.start("merging", merger.model.checkpoint.total_bytes, "bytes")
    own: _Piece | None = None
    with ThreadPoolExecutor(READERS) as readers:
        for piece in read_ahead(readers, merger.pieces(tasks), depth=2 * READERS):
            if piece.update is not None and piece.seen is not None:
                piece.update.hashed(piece.task.name, piece.seen.first, piece.values)
            if piece.update is None:
                own = piece
                merger.begin(piece)
            elif piece.update is merger.control:
                merger.subtract(piece)
            else:
                merger.add(piece)
            if not piece.last:
                continue
            assert own is not None
            if own.task.tensor.is_float:
                merger.step(own)
            merger.end(own)
            offset = own.first * own.task.layout.view[2]
            sink.write(own.task.name, offset * own.values.itemsize, own.values)
            if rest is not None and own.residual is not None:
                rest.write(own.task.name, offset * 2, own.residual)
            progress.advance(own.values.nbytes)
    progress.finish()
    return merger.after.hexdigest(tasks) if merger.after else None
