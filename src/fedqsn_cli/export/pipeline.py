"""One pass over an owner's model: read, hide, hash, quantize, and hand to every output that wants it.

    checkpoint ──read──▶ W ──server mask──▶ X ──quantize──▶ Q(X) ─┬─▶ server model
                                      └──▶ model digest          ├─▶ proxy of client 1
    public base ──read──▶ B ────────────────quantize──▶ Q(B) ────┴─▶ proxy of client 2 ...
    (as far as here several chunks at once, in threads)            (in order)

Tensors go by in chunks of whole rows; nothing that grows with the model is kept. What is quantized never depends on a
client: outputs select from the same codes (DESIGN: "quantize once, select per client").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.artifacts.manifests import Quantization
from fedqsn_cli.errors import InputError
from fedqsn_cli.export.encode import check_finite, encode, encode_with
from fedqsn_cli.kernels.hash_threads import HashThreads
from fedqsn_cli.kernels.read_ahead import read_ahead
from fedqsn_cli.kernels.threads import thread_count, work_alone
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.models.digest import ModelHash
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.models.public_base import PublicBase
from fedqsn_cli.models.tensor_task import TensorTask
from fedqsn_cli.progress import Progress
from fedqsn_cli.quantization.layout import row_chunks
from fedqsn_cli.quantization.scales import Scales

CHUNK_ELEMENTS = 1 << 21  # 4 MiB of bf16: large enough for the disk, small enough for the caches and many outputs
MOST_WORKERS = 4  # chunks that are worked on at once; together faster than one thread hashes


Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Fill:
    """The public base, quantized like the chunk it belongs to.

    Args:
        own: under its own block scales.
        shared: under the block scales of the model, for blocks that mix units; None where no block does.
    """

    own: Array
    shared: Array | None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows `first` .. `first + rows` of a tensor's working view, as every output may see them. Read-only.

    Args:
        values: [rows, cols] raw or snapped values as stored bits (kinds raw and snap; transposed tensors as they are
            stored), int8 codes [rows, cols] (pack8), or packed 4-bit codes [rows * cols / 2] (pack4).
        fill: the same for the public base, which a client mask uncovers; None for zero fill.
    """

    first: int
    rows: int
    values: Array
    fill: Fill | None


@dataclass(frozen=True, slots=True)
class TensorScales:
    """Block scales of a whole tensor, and those of the public base under its own scales (base fill)."""

    model: Scales
    base: Scales | None


class Output(Protocol):
    """Something that a pass over the model writes."""

    def take(self, task: TensorTask, chunk: Chunk) -> None:
        """Write these rows."""

    def finish(self, task: TensorTask, scales: TensorScales | None) -> None:
        """All rows of the tensor went by; these are its block scales (kinds pack4 and pack8)."""


@dataclass(frozen=True, slots=True)
class Digests:
    """What went by: `model` over M_H ⊙ W, in which hidden weights have no part; `base` over the public base."""

    model: str
    base: str | None


def run(
    model: OpenModel,
    tasks: Sequence[TensorTask],
    how: Quantization | None,
    outputs: Sequence[Output],
    *,
    base: PublicBase | None,
    progress: Progress,
) -> Digests:
    """Send every tensor of `model` through the pass.

    Args:
        model: the owner's model; when it is quantized already, its codes are passed on as they are.
        todo: what `flows` made of it.
        how: the quantization of the outputs, None for raw values.
        outputs: who takes the result.
        base: the public base for base fill.
        progress: told of bytes read.

    Raises:
        InputError: a visible weight is NaN or infinite.
    """
    progress.start("reading", sum(model.stored_bytes(task.name) for task in tasks), "bytes")
    count = min(MOST_WORKERS, thread_count())
    with ThreadPoolExecutor(count, "fedqsn-chunk", work_alone) as workers, HashThreads() as hashing:
        hasher = None if model.is_quantized else ModelHash(hashing.queue())
        joint = TensorAssembler(model, how, hasher, ModelHash(hashing.queue()) if base else None)
        for made in read_ahead(workers, _tasks(model, base, tasks, how), depth=count):
            chunk = joint.chunk(made)
            for output in outputs:
                output.take(made.task, chunk)
            progress.advance(made.visible.nbytes)
            if made.last:
                scales = joint.scales(made)
                for output in outputs:
                    output.finish(made.task, scales)
        digests = joint.digests(tasks)
    progress.finish()
    return digests


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """Rows that were read, hidden and quantized, of the model and of the public base.

    Args:
        visible: M_H ⊙ W, or the codes of a model that is quantized already. base: the same rows of the public base.
        values, scales: what `encode` made of it, with the public base in its holes.
        fill, fill_scales: what `encode` made of the public base.
    """

    task: TensorTask
    first: int
    rows: int
    last: bool
    visible: Array
    values: Array
    scales: Array | None
    base: Array | None
    fill: Fill | None
    fill_scales: Array | None


def _tasks(
    model: OpenModel, base: PublicBase | None, tasks: Sequence[TensorTask], how: Quantization | None
) -> Iterator[Callable[[], EncodedChunk] | None]:
    """Everything there is to do, in order, as calls that do it; None: not before everything up to here is used."""
    maker = ChunkEncoder(model, base, how)
    for task in tasks:
        if task.plan.axis == "element":
            yield None  # its masks are as large as itself: those of one tensor at a time
        hidden = task.hidden
        runs = list(row_chunks(task.layout, how.block_size if how else 1, CHUNK_ELEMENTS))
        for first, rows in runs:
            yield partial(maker.make, task, hidden, first, rows, last=(first, rows) == runs[-1])


@dataclass(frozen=True, slots=True)
class ChunkEncoder:
    """Reads, hides and quantizes one chunk, in any thread."""

    model: OpenModel
    base: PublicBase | None
    how: Quantization | None

    def make(self, task: TensorTask, hidden: UnitMask | None, first: int, rows: int, *, last: bool) -> EncodedChunk:
        x = self.model.read_rows(task.name, task.layout, first, rows)
        b = None
        if self.base is not None and task.plan.masked:
            b = self.base.read_rows(task.name, task.layout, first, rows)
            check_finite(task, b, "public base")
        if self.model.is_quantized:
            values, scales = x, self._stored_scales(task, first, rows) if b is not None else None
        else:
            values, scales = encode(task, self.how, self._hide(task, hidden, first, x, b))
        fill, fill_scales = (None, None) if b is None else self._fill(task, b, scales)
        return EncodedChunk(task, first, rows, last, x, values, scales, b, fill, fill_scales)

    def _hide(self, task: TensorTask, hidden: UnitMask | None, first: int, x: Array, b: Array | None) -> Array:
        """M_H ⊙ W in place, checked; returns it with the public base, or what became of it, in the holes."""
        filled = x
        if hidden is not None:
            if b is not None:
                filled = x.copy()
                if not self.model.has_trained_fill:
                    hidden.overwrite(filled, first, b)
            hidden.overwrite(x, first, None)
        if task.layout.kind == "raw":  # whoever quantizes notices by himself
            check_finite(task, x, "model")
        return filled

    def _stored_scales(self, task: TensorTask, first: int, rows: int) -> Array | None:
        """Block scales of rows of a model that is packed already; only a public base needs them."""
        if not task.layout.packed or self.how is None:
            return None
        cols, block = task.layout.view[2], task.layout.scale_block(self.how.block_size)
        absmax: Array = self.model.scales(task.name).absmax
        return absmax[first * cols // block : -(-(first + rows) * cols // block)]

    def _fill(self, task: TensorTask, b: Array, scales: Array | None) -> tuple[Fill, Array | None]:
        own, own_scales = encode(task, self.how, b, "public base")
        if own_scales is None or self.how is None or scales is None:
            return Fill(own, None), None
        mixed = task.layout.mixes_units(self.how.block_size)
        return Fill(own, encode_with(task, self.how, b, scales) if mixed else None), own_scales


class TensorAssembler:
    """Puts chunks together again, in their order: hashes them, and keeps the scales of the tensor that is going by."""

    def __init__(
        self, model: OpenModel, how: Quantization | None, hasher: ModelHash | None, base_hasher: ModelHash | None
    ) -> None:
        self._model = model
        self._how = how
        self._hasher = hasher
        self._base_hasher = base_hasher
        self._scales: list[Array] = []
        self._base_scales: list[Array] = []

    def chunk(self, made: EncodedChunk) -> Chunk:
        """What outputs see of it."""
        if made.base is not None and self._base_hasher is not None:
            self._base_hasher.update(made.task.name, made.base)
        if self._hasher is not None:
            self._hasher.update(made.task.name, made.visible)
            if made.scales is not None:
                self._scales.append(made.scales)
        if made.fill_scales is not None:
            self._base_scales.append(made.fill_scales)
        return Chunk(made.first, made.rows, made.values, made.fill)

    def scales(self, made: EncodedChunk) -> TensorScales | None:
        """Block scales of the tensor that has gone by."""
        task, how = made.task, self._how
        if how is None or not task.layout.packed:
            return None
        block = 0 if task.layout.kind == "pack8" else how.block_size
        if self._hasher is None:
            model = self._model.scales(task.name)
        else:
            model = Scales.of(how.format, block, np.concatenate(self._scales), double=how.double_quant)
        base = Scales(how.format, block, np.concatenate(self._base_scales)) if self._base_scales else None
        self._scales, self._base_scales = [], []
        return TensorScales(model, base)

    def digests(self, tasks: Sequence[TensorTask]) -> Digests:
        """Digests of everything that went by."""
        manifest = self._model.manifest
        model = self._hasher.hexdigest(tasks) if self._hasher else manifest.model_digest if manifest else None
        if model is None:
            raise InputError("its manifest has no model digest", where=self._model.source.reference)
        return Digests(model, self._base_hasher.hexdigest(tasks) if self._base_hasher else None)
