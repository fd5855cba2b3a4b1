"""The pass of a merge: one chunk of the model, then the same rows of every update, then those of a control update.

    for chunk in merge_pass.chunks():      read ahead in threads; summed, moved and hashed here, in order
        chunk.write_to(sink, residual)     stored bits: to files that writer threads store, or to tensors in memory

Memory holds one chunk, its sum and a few chunks read ahead, however many clients there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.checkpoint import TensorSpec
from fedqsn_cli.dtypes import SHORT_DTYPES
from fedqsn_cli.errors import RefusedUpdate
from fedqsn_cli.kernels.hash_threads import HashThreads
from fedqsn_cli.kernels.read_ahead import read_ahead
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.merging import arithmetic
from fedqsn_cli.merging.read_update import ClientUpdate, UpdateReader, UpdateSlice
from fedqsn_cli.merging.stored_values import ReadValues
from fedqsn_cli.models.digest import ModelHash
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.models.residual import Residual
from fedqsn_cli.models.tensor_task import TensorTask
from fedqsn_cli.options import MergeOptions
from fedqsn_cli.progress import Progress
from fedqsn_cli.quantization.layout import row_chunks

CHUNK_ELEMENTS = 1 << 20  # its double-precision sum takes 8 MiB
READERS = 3  # pieces that are read at once, from one file each perhaps: the disk is never idle

Array = NDArray[Any]
Doubles = NDArray[np.float64]


class Sink(Protocol):
    """Takes the bytes of tensors, chunk by chunk."""

    def write(self, name: str, offset: int, data: Array) -> None:
        """The bytes of a tensor from `offset` on."""


class InMemorySink:
    """Tensors in memory, written like a file."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self.specs = {spec.name: spec for spec in specs}
        self.bytes = {spec.name: np.empty(spec.nbytes, np.uint8) for spec in specs}

    def write(self, name: str, offset: int, data: Array) -> None:
        """The bytes of a tensor from `offset` on."""
        view = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        self.bytes[name][offset : offset + view.size] = view


@dataclass(frozen=True, slots=True)
class Weights:
    """A model in memory: its weights as they are stored, and the residual of the 16-bit weights that have one."""

    stored: InMemorySink
    residual: InMemorySink


@dataclass(frozen=True, slots=True)
class ModelChunk:
    """Rows `first` .. `first + rows` of one tensor of the model; a pass changes them in place.

    Args:
        values: stored bits [rows, cols]. residual: bf16 bits of the same shape, for 16-bit floats.
    """

    task: TensorTask
    first: int
    rows: int
    values: Array
    residual: Array | None

    def write_to(self, sink: Sink, residual_sink: Sink | None) -> None:
        """Write the rows, and their residual if there is a sink for it."""
        offset = self.first * self.task.layout.view[2]
        sink.write(self.task.name, offset * self.values.itemsize, self.values)
        if residual_sink is not None and self.residual is not None:
            residual_sink.write(self.task.name, offset * self.residual.itemsize, self.residual)


def write_chunks(chunks: Iterable[ModelChunk], sink: Sink, residual_sink: Sink | None, progress: Progress) -> None:
    """Write all chunks of a model where they belong, and tell of the bytes."""
    for chunk in chunks:
        chunk.write_to(sink, residual_sink)
        progress.advance(chunk.values.nbytes)
    progress.finish()


@dataclass(frozen=True, slots=True)
class UpdateChunk:
    """The elements of one update that belong to a chunk of the model."""

    part: UpdateSlice
    read: ReadValues


class MergePass:
    """Reads a model and all updates in step. What it counts is complete once all chunks were taken.

    Args:
        tasks: the tensors of `model`, in order.
        updates: of the clients. control: an update of the owner's own, taken off what the clients sent.
        options: `normalize` and `control_weight` count here. rate: η.
    """

    def __init__(
        self,
        model: OpenModel,
        tasks: Sequence[TensorTask],
        updates: Sequence[ClientUpdate],
        control: ClientUpdate | None,
        options: MergeOptions,
        rate: float,
        hashing: HashThreads,
    ) -> None:
        self._model = model
        self._tasks = tasks
        self._options = options
        self._rate = rate
        self._residual = Residual(model)
        self._scratch = Scratch()
        self.clients = [UpdateReader(update, hashing.queue()) for update in updates]
        self.control = UpdateReader(control, hashing.queue()) if control else None
        self.examples = sum(update.examples for update in updates)
        self.covered = 0
        """Number of elements that at least one client trained."""
        self.squares = 0.0
        """Sum of squares of the server-visible weights."""
        self._before = ModelHash(hashing.queue())
        self._after = ModelHash(hashing.queue()) if model.kind == "server-model" else None

    @property
    def readers(self) -> list[UpdateReader]:
        """Of all updates, the control last."""
        return [*self.clients, *([self.control] if self.control else [])]

    def chunks(self) -> Generator[ModelChunk, None, None]:
        """The chunks of the merged model, in order.

        Raises:
            RefusedUpdate: an update is not finite, or the merged model is not. Digests and norms are only known when
                all chunks were taken.
        """
        with ThreadPoolExecutor(READERS) as threads:
            pieces: Iterator[Any] = read_ahead(threads, self._reads(), depth=2 * READERS)
            for chunk in pieces:  # the model's rows; those of every update follow, and `_merge` takes them
                self._merge(chunk, pieces)
                yield chunk

    def digest_before(self) -> str:
        """Content digest of the model that was read."""
        return self._before.hexdigest(self._tasks)

    def digest_after(self) -> str | None:
        """Content digest of the merged model, as the next export will compute it; None for a global model."""
        return self._after.hexdigest(self._tasks) if self._after else None

    def relative_norm(self, reader: UpdateReader) -> float:
        """Norm of a client's Δ over the norm of the visible model."""
        return math.sqrt(reader.squares / self.squares) if self.squares else 0.0

    def _reads(self) -> Iterator[Callable[[], ModelChunk | UpdateChunk]]:
        """Everything there is to read, in the order in which `chunks` takes it, as calls that read it."""
        for task in self._tasks:
            for first, rows in row_chunks(task.layout, 1, CHUNK_ELEMENTS):
                yield partial(self._read_model, task, first, rows)
                for reader in self.readers if task.tensor.is_float else ():
                    yield partial(_read_update, reader, task.name, reader.locate(task, first, rows))

    def _read_model(self, task: TensorTask, first: int, rows: int) -> ModelChunk:
        values = self._model.read_rows(task.name, task.layout, first, rows)
        residual = None
        if task.tensor.dtype in SHORT_DTYPES:
            residual = self._residual.rows(task.name, first, rows, task.layout.view[2])
        return ModelChunk(task, first, rows, values, residual)

    def _merge(self, chunk: ModelChunk, pieces: Iterator[UpdateChunk]) -> None:
        """Move a chunk in place, and hash it before and after; the next pieces are the same rows of every update."""
        task = chunk.task
        visible = _visible(chunk, copy=True)  # the rows themselves will move while these are hashed
        self._before.update(task.name, visible)
        if task.tensor.is_float:
            self.squares += arithmetic.sum_of_squares(visible, task.tensor.dtype)
            self._step(chunk, pieces)
        if self._after is not None:
            self._after.update(task.name, _visible(chunk, copy=False))

    def _step(self, chunk: ModelChunk, pieces: Iterator[UpdateChunk]) -> None:
        """W' = W + η Δ: begin a sum, add every update, take the control off, move the rows."""
        chunk_sum = ChunkSum(chunk, self._scratch)
        for reader in self.clients:
            chunk_sum.add(reader, next(pieces))
        if self.control is not None:
            chunk_sum.subtract(self.control, next(pieces), self._options.control_weight)
        self.covered += chunk_sum.covered
        chunk_sum.move(self._rate, float(self.examples) if self._options.normalize == "clients" else None)


def _read_update(reader: UpdateReader, name: str, part: UpdateSlice) -> UpdateChunk:
    return UpdateChunk(part, reader.read(name, part))


def _visible(chunk: ModelChunk, *, copy: bool) -> Array:
    """The rows of a chunk with zeros where the server hides units; the rows themselves where nothing is hidden."""
    hidden: UnitMask | None = chunk.task.hidden
    if hidden is None:
        return chunk.values.copy() if copy else chunk.values
    visible = chunk.values.copy()
    hidden.overwrite(visible, chunk.first, None)
    return visible


class Scratch:
    """Double-precision arrays that chunks use one after the other."""

    def __init__(self) -> None:
        self._arrays: dict[str, Doubles] = {}

    def zeros(self, use: str, shape: tuple[int, ...]) -> Doubles:
        """An array of zeros; what an earlier call for the same use returned is overwritten."""
        size = math.prod(shape)
        if use not in self._arrays or self._arrays[use].size < size:
            self._arrays[use] = np.empty(size)
        array = self._arrays[use][:size].reshape(shape)
        array[:] = 0
        return array


class ChunkSum:
    """The sum of all updates over one chunk of the model: Σ n_k Δ_k [rows, cols] and Σ n_k for each unit."""

    def __init__(self, chunk: ModelChunk, scratch: Scratch) -> None:
        self._chunk = chunk
        self._scratch = scratch
        self._total = scratch.zeros("total", chunk.values.shape)
        units = {None: 1, "row": chunk.rows, "column": chunk.values.shape[1], "element": chunk.values.size}
        self._examples = np.zeros(units[chunk.task.plan.axis])

    def add(self, reader: UpdateReader, piece: UpdateChunk) -> None:
        """Add one client's Δ_k, n_k times. Raises RefusedUpdate for NaN and infinity."""
        update, tensor = reader.update, self._chunk.task.plan
        weight = update.examples / update.scale(tensor)
        self._accumulate(self._total, reader, piece, weight)
        self._examples[piece.part.index if update.axis(tensor) else slice(None)] += update.examples

    def subtract(self, reader: UpdateReader, piece: UpdateChunk, weight: float) -> None:
        """Take `weight` times the control's Δ off every client's: times the examples of those who saw the unit."""
        drift = self._scratch.zeros("drift", self._total.shape)
        self._accumulate(drift, reader, piece, 1.0 / reader.update.scale(self._chunk.task.plan))
        arithmetic.subtract(self._total, drift, self._examples, self._chunk.task.plan.axis, weight)

    def _accumulate(self, total: Doubles, reader: UpdateReader, piece: UpdateChunk, weight: float) -> None:
        update, tensor, read = reader.update, self._chunk.task.plan, piece.read
        reader.hash(read)
        squares = arithmetic.add(total, read.values, read.dtype, piece.part.index, update.axis(tensor), weight)
        reader.measure(tensor, squares)

    @property
    def covered(self) -> int:
        """Number of elements that at least one client trained."""
        return int(np.count_nonzero(self._examples)) * (self._total.size // max(1, self._examples.size))

    def move(self, rate: float, examples: float | None) -> None:
        """W' = W + η Δ in place.

        Args:
            rate: η. examples: what to divide by; None divides each unit by the examples of the clients that saw it.

        Raises:
            RefusedUpdate: the result is not finite.
        """
        task, chunk = self._chunk.task, self._chunk
        divisors = self._examples
        if examples is not None:
            divisors = np.where(divisors > 0, examples, 0.0)
        bad = arithmetic.step(
            chunk.values, chunk.residual, task.tensor.dtype, self._total, divisors, task.plan.axis, rate
        )
        if bad:
            raise RefusedUpdate(
                f"the merged tensor would hold {bad} infinite or NaN values",
                where=task.name,
                hint="an update is poisoned, or --server-lr is too large",
            )
