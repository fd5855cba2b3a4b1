"""One pass over an owner's model: read, hide, hash, quantize, and hand to every output that wants it.

    checkpoint ──read──▶ W ──server mask──▶ X ──quantize──▶ Q(X) ─┬─▶ server model
                                      └──▶ model digest          ├─▶ proxy of client 1
    public base ──read──▶ B ────────────────quantize──▶ Q(B) ────┴─▶ proxy of client 2 ...
    (up to here several chunks at once, in threads)                (in order)

Tensors are streamed in chunks of whole rows; nothing that grows with the model is kept. What is quantized never depends
on a client: outputs select from the same codes (quantize once, select per client).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.artifacts.manifests import Quantization
from fedqsn_cli.errors import InputError
from fedqsn_cli.export.encode import check_finite, encode, encode_with
from fedqsn_cli.kernels.digests import Algorithm
from fedqsn_cli.kernels.hash_threads import HashThreads
from fedqsn_cli.kernels.read_ahead import ANNOUNCED, announced, compute_ahead
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.models.digest import ModelHash
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.models.public_base import PublicBase
from fedqsn_cli.models.tensor_task import TensorTask
from fedqsn_cli.progress import Progress
from fedqsn_cli.quantization.layout import row_chunks
from fedqsn_cli.quantization.scales import Scales

CHUNK_ELEMENTS = 1 << 21  # 4 MiB of bf16: large enough for the disk, small enough for the caches and many outputs


Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class EncodedBase:
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
    fill: EncodedBase | None


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
        """All rows of the tensor were taken; these are its block scales (kinds pack4 and pack8)."""


@dataclass(frozen=True, slots=True)
class Digests:
    """Digests of what was read: `model` over M_H ⊙ W, without hidden weights; `base` over the public base."""

    model: str
    base: str | None


def run(
    model: OpenModel,
    tasks: Sequence[TensorTask],
    quantization: Quantization | None,
    outputs: Sequence[Output],
    *,
    base: PublicBase | None,
    algorithm: Algorithm = "blake3",
    progress: Progress,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Digests:
    """Send every tensor of `model` through the pass.

    Args:
        model: the owner's model; when it is quantized already, its codes are passed on as they are.
        tasks: its tensors, in the order of the outputs.
        quantization: of the outputs, None for raw values.
        outputs: what is written.
        base: the public base for base fill; one that is `whole` is read in place of a global model.
        algorithm: of the digest of the model.
        progress: told of bytes read.
        chunk_elements: size of a chunk; decides no byte of any output.

    Raises:
        InputError: a visible weight is NaN or infinite.
    """
    progress.start("reading", sum(model.stored_bytes(task.name) for task in tasks), "bytes")
    with HashThreads() as hashing:
        hasher = None if model.is_quantized else ModelHash(hashing.queue(), algorithm)
        base_hasher = ModelHash(hashing.queue(), "sha256") if base else None
        assembler = TensorAssembler(model, quantization, hasher, base_hasher)
        for encoded in compute_ahead(encode_calls(model, base, tasks, quantization, chunk_elements)):
            chunk = assembler.chunk(encoded)
            for output in outputs:
                output.take(encoded.task, chunk)
            progress.advance(encoded.visible.nbytes)
            if encoded.last:
                scales = assembler.scales(encoded.task)
                for output in outputs:
                    output.finish(encoded.task, scales)
        digests = assembler.digests(tasks)
    progress.finish()
    return digests


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """Rows of the model, and of the public base, that were read, hidden and quantized.

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
    fill: EncodedBase | None
    fill_scales: Array | None


def encode_calls(
    model: OpenModel,
    base: PublicBase | None,
    tasks: Sequence[TensorTask],
    quantization: Quantization | None,
    chunk_elements: int,
) -> Iterator[Callable[[], EncodedChunk] | None]:
    """The calls that encode every chunk, in order; None: what follows waits until everything before it is used."""
    encoder, hidden = ChunkEncoder(model, base, quantization), None
    block = quantization.block_size if quantization else 1
    pieces = ((task, *piece) for task in tasks for piece in row_chunks(task.layout, block, chunk_elements))
    for task, first, rows in announced(pieces, lambda piece: encoder.expect(*piece), encoder.distance):
        if not first:
            if task.plan.axis == "element":
                yield None  # element masks are as large as their tensor: hold those of one tensor at a time
            hidden = task.hidden
        yield partial(encoder.encode, task, hidden, first, rows)


@dataclass(frozen=True, slots=True)
class ChunkEncoder:
    """Reads, hides and quantizes one chunk, in any thread."""

    model: OpenModel
    base: PublicBase | None
    quantization: Quantization | None

    @property
    def distance(self) -> int:
        """How many pieces are read ahead: none where a wider piece of the public base may come with each."""
        return ANNOUNCED if self.base is None else 0

    def expect(self, task: TensorTask, first: int, rows: int) -> None:
        """Begin to read what `encode` will need."""
        filled = self.base is not None and self.base.fills(task.plan)
        if self.base is not None and filled:
            self.base.expect_rows(task.name, task.layout, first, rows)
        if not filled or not self._replaced:
            self.model.expect_rows(task.name, task.layout, first, rows)

    def encode(self, task: TensorTask, hidden: UnitMask | None, first: int, rows: int) -> EncodedChunk:
        """Read, hide and quantize rows `first` .. `first + rows`."""
        b = None
        if self.base is not None and self.base.fills(task.plan):
            b = self.base.read_rows(task.name, task.layout, first, rows)
            check_finite(task, b, "public base")
        x = b if b is not None and self._replaced else self.model.read_rows(task.name, task.layout, first, rows)
        if self.model.is_quantized:
            values, scales = x, self._stored_scales(task, first, rows) if b is not None else None
        else:
            values, scales = encode(task, self.quantization, self._hide(task, hidden, first, x, b))
        # A client mask uncovers the base; where the base is the model, there is nothing for it to hide.
        fill, fill_scales = (
            (None, None) if self.base is None or self.base.whole or b is None else self._fill(task, b, scales)
        )
        last = first + rows == task.layout.view[0] * task.layout.view[1]
        return EncodedChunk(task, first, rows, last, x, values, scales, b, fill, fill_scales)

    @property
    def _replaced(self) -> bool:
        """Is the public base read in the model's place? A server model holds it, or what clients made of it."""
        return self.base is not None and self.base.whole and self.model.kind == "global-model"

    def _hide(self, task: TensorTask, hidden: UnitMask | None, first: int, x: Array, b: Array | None) -> Array:
        """M_H ⊙ W in place, checked; returns it with the public base, or what became of it, in the holes."""
        filled = x
        if hidden is not None:
            if b is not None:
                filled = x.copy()
                if not self.model.has_trained_fill:
                    hidden.overwrite(filled, first, b)
            hidden.overwrite(x, first, None)
        if task.layout.kind == "raw":  # quantizing checks by itself
            check_finite(task, x, "model")
        return filled

    def _stored_scales(self, task: TensorTask, first: int, rows: int) -> Array | None:
        """Block scales of rows of a model that is packed already; only a public base needs them."""
        if not task.layout.packed or self.quantization is None:
            return None
        cols, block = task.layout.view[2], task.layout.scale_block(self.quantization.block_size)
        absmax: Array = self.model.scales(task.name).absmax
        return absmax[first * cols // block : -(-(first + rows) * cols // block)]

    def _fill(self, task: TensorTask, b: Array, scales: Array | None) -> tuple[EncodedBase, Array | None]:
        own, own_scales = encode(task, self.quantization, b, "public base")
        if own_scales is None or self.quantization is None or scales is None:
            return EncodedBase(own, None), None
        mixed = task.layout.mixes_units(self.quantization.block_size)
        return EncodedBase(own, encode_with(task, self.quantization, b, scales) if mixed else None), own_scales


class TensorAssembler:
    """Takes encoded chunks in their order: hashes them, and collects the scales of the current tensor."""

    def __init__(
        self,
        model: OpenModel,
        quantization: Quantization | None,
        hasher: ModelHash | None,
        base_hasher: ModelHash | None,
    ) -> None:
        self._model = model
        self._quantization = quantization
        self._hasher = hasher
        self._base_hasher = base_hasher
        self._scales: list[Array] = []
        self._base_scales: list[Array] = []

    def chunk(self, encoded: EncodedChunk) -> Chunk:
        """What outputs see of it."""
        if encoded.base is not None and self._base_hasher is not None:
            self._base_hasher.update(encoded.task.name, encoded.base)
        if self._hasher is not None:
            self._hasher.update(encoded.task.name, encoded.visible)
            if encoded.scales is not None:
                self._scales.append(encoded.scales)
        if encoded.fill_scales is not None:
            self._base_scales.append(encoded.fill_scales)
        return Chunk(encoded.first, encoded.rows, encoded.values, encoded.fill)

    def scales(self, task: TensorTask) -> TensorScales | None:
        """Block scales of the tensor whose last chunk was taken."""
        quantization = self._quantization
        if quantization is None or not task.layout.packed:
            return None
        format_name, block = quantization.format, 0 if task.layout.kind == "pack8" else quantization.block_size
        if self._hasher is None:
            model = self._model.scales(task.name)
        else:
            model = Scales.of(format_name, block, np.concatenate(self._scales), double=quantization.double_quant)
        base = Scales(format_name, block, np.concatenate(self._base_scales)) if self._base_scales else None
        self._scales, self._base_scales = [], []
        return TensorScales(model, base)

    def digests(self, tasks: Sequence[TensorTask]) -> Digests:
        """Digests of all that was taken."""
        manifest = self._model.manifest
        model = self._hasher.digest(tasks) if self._hasher else manifest.model_digest if manifest else None
        if model is None:
            raise InputError("its manifest has no model digest", where=self._model.source.reference)
        return Digests(model, self._base_hasher.digest(tasks) if self._base_hasher else None)
