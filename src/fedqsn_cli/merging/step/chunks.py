"""A model and updates read in step: one chunk of the model, then the same rows of every update.

for chunk, pieces in joint_chunks(model, tasks, sources):      read ahead in threads
    for source, piece in zip(sources, pieces): ...             all pieces of a chunk, before the next chunk
    chunk.write_to(sink, residual)     stored bits: to files that writer threads store, or to tensors in memory
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.checkpoint import TensorSpec
from fedqsn_cli.dtypes import SHORT_DTYPES
from fedqsn_cli.kernels.read_ahead import read_ahead
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.models.residual import Residual
from fedqsn_cli.models.tensor_task import TensorTask
from fedqsn_cli.progress import Progress
from fedqsn_cli.quantization.layout import row_chunks

CHUNK_ELEMENTS = 1 << 19  # its exact sum takes 8 MiB
STACK_ELEMENTS = 1 << 22  # of all updates together, where a pass holds them side by side: 32 MiB
READERS = 3  # pieces that are read at once, from one file each perhaps: the disk is never idle

Array = NDArray[Any]


class Sink(Protocol):
    """Takes the bytes of tensors, chunk by chunk."""

    def write(self, name: str, offset: int, data: Array) -> None:
        """The bytes of a tensor from `offset` on."""


class Source(Protocol):
    """Has rows for every chunk of the model: an update, or a partial sum of several."""

    def prepare(self, task: TensorTask, first: int, rows: int) -> Callable[[], object]:
        """A call that reads what belongs to these rows of a tensor, from any thread; asked for in the order of rows."""


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


def stack_elements(clients: int) -> int:
    """About how many weights a chunk has where all updates of it are held side by side."""
    return max(1, min(CHUNK_ELEMENTS, STACK_ELEMENTS // max(1, clients)))


def average_elements() -> int:
    """About how many weights a chunk has that needs no exact sum in memory."""
    return 2 * CHUNK_ELEMENTS


def joint_chunks(
    model: OpenModel, tasks: Sequence[TensorTask], sources: Sequence[Source], elements: int | None = None
) -> Generator[tuple[ModelChunk, Iterator[Any]], None, None]:
    """The chunks of a model, in order, each with the same rows of every source; none has rows of whole numbers.

    Args:
        tasks: the tensors of `model`, in order.
        elements: about how many weights a chunk has, if not the usual number. It is whole rows, and at least one.
    """
    reads = _reads(model, Residual(model), tasks, sources, elements or CHUNK_ELEMENTS)
    with ThreadPoolExecutor(READERS) as threads:
        pieces: Iterator[Any] = read_ahead(threads, reads, 2 * READERS)
        for chunk in pieces:  # the model's rows; those of every source follow, and the caller takes them
            yield chunk, pieces


def _reads(
    model: OpenModel, residual: Residual, tasks: Sequence[TensorTask], sources: Sequence[Source], elements: int
) -> Iterator[Callable[[], object]]:
    """Everything there is to read, in order, as calls that read it."""
    for task in tasks:
        for first, rows in row_chunks(task.layout, 1, elements):
            yield partial(_read_model, model, residual, task, first, rows)
            for source in sources if task.tensor.is_float else ():
                yield source.prepare(task, first, rows)


def _read_model(model: OpenModel, residual: Residual, task: TensorTask, first: int, rows: int) -> ModelChunk:
    values = model.read_rows(task.name, task.layout, first, rows)
    short = task.tensor.dtype in SHORT_DTYPES
    kept = residual.rows(task.name, first, rows, task.layout.view[2]) if short else None
    return ModelChunk(task, first, rows, values, kept)


def visible_rows(chunk: ModelChunk, *, copy: bool) -> Array:
    """The rows of a chunk with zeros where the server hides units; the rows themselves where nothing is hidden."""
    hidden: UnitMask | None = chunk.task.hidden
    if hidden is None:
        return chunk.values.copy() if copy else chunk.values
    visible = chunk.values.copy()
    hidden.overwrite(visible, chunk.first, None)
    return visible
