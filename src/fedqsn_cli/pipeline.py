"""One pass over an owner's model: read, hide, hash, quantize, and hand to every output that wants it.

    checkpoint ──read──▶ W ──server mask──▶ X ──quantize──▶ Q(X) ─┬─▶ server model
        (ahead, in a thread)          └──▶ model digest          ├─▶ proxy of client 1
    public base ──read──▶ B ────────────────quantize──▶ Q(B) ────┴─▶ proxy of client 2 ...

Tensors go by in chunks of whole rows; nothing that grows with the model is kept. What is quantized never depends on a
client: outputs select from the same codes (DESIGN: "quantize once, select per client").
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli import strictjson
from fedqsn_cli.artifacts import Quantization
from fedqsn_cli.bases import AlignedBase
from fedqsn_cli.errors import InputError
from fedqsn_cli.hashing import HashThreads, Lane
from fedqsn_cli.logical import LogicalTensor, OpenModel
from fedqsn_cli.plan import TensorPlan
from fedqsn_cli.progress import Progress
from fedqsn_cli.quantization import kernels
from fedqsn_cli.quantization.scales import Scales
from fedqsn_cli.storage import Storage, row_chunks, storage_of
from fedqsn_cli.units import UnitMask

CHUNK_ELEMENTS = 1 << 21  # 4 MiB of bf16: large enough for the disk, small enough for the caches and many outputs

_DTYPE_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16",
    "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL",
)  # fmt: skip

Array = NDArray[Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Flow:
    """One tensor on its way: what the plan says, how it is stored, and who says which units the server hides."""

    tensor: TensorPlan
    logical: LogicalTensor
    storage: Storage
    hides: Callable[[TensorPlan], UnitMask | None] | None

    @property
    def hidden(self) -> UnitMask | None:
        """Hidden units, in the stored view; None when nothing is. Not kept here: it may be as large as the tensor."""
        return self.hides(self.tensor) if self.hides else None

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.tensor.shape)


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

    def take(self, flow: Flow, chunk: Chunk) -> None:
        """Write these rows."""

    def finish(self, flow: Flow, scales: TensorScales | None) -> None:
        """All rows of the tensor went by; these are its block scales (kinds pack4 and pack8)."""


@dataclass(frozen=True, slots=True)
class Digests:
    """What went by: `model` over M_H ⊙ W, in which hidden weights have no part; `base` over the public base."""

    model: str
    base: str | None


def flows(model: OpenModel, how: Quantization | None, hidden: Callable[[TensorPlan], UnitMask | None]) -> list[Flow]:
    """Decide for every tensor how it goes through a pass.

    The order is that of the safetensors library (wide dtypes first, then names): shards change nothing, and an
    unchanged model is written as the library would write it.
    """

    def place(tensor: TensorPlan) -> tuple[int, str]:
        packed = storage_of(tensor, how).kind == "pack8"  # int8 codes do not tell what dtype they were made of
        return _DTYPE_ORDER.index("I8" if packed else tensor.dtype), tensor.name

    return [
        Flow(tensor, model.tensors[tensor.name], storage_of(tensor, how), hidden)
        for tensor in sorted(model.plan.tensors, key=place)
    ]


def run(
    model: OpenModel,
    todo: Sequence[Flow],
    how: Quantization | None,
    outputs: Sequence[Output],
    *,
    base: AlignedBase | None,
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
    packed = model.is_quantized
    progress.start("reading", sum(model.stored_bytes(flow.name) for flow in todo), "bytes")
    with ThreadPoolExecutor(1) as reader, HashThreads() as hashing:
        hasher = None if packed else ModelHash(hashing.lane())
        worker = _Worker(model, how, hasher, ModelHash(hashing.lane()) if base else None)
        for load in read_ahead(reader, _loads(model, base, todo, how), depth=2):
            chunk = worker.chunk(load)
            for output in outputs:
                output.take(load.flow, chunk)
            progress.advance(load.values.nbytes)
            if load.last:
                scales = worker.scales(load)
                for output in outputs:
                    output.finish(load.flow, scales)
        digests = worker.digests(todo)
    progress.finish()
    return digests


@dataclass(frozen=True, slots=True)
class _Load:
    """Rows as they were read, of the model and of the public base."""

    flow: Flow
    first: int
    rows: int
    values: Array
    fill: Array | None
    last: bool


def _loads(
    model: OpenModel, base: AlignedBase | None, todo: Sequence[Flow], how: Quantization | None
) -> Iterator[Callable[[], _Load]]:
    """Everything there is to read, in order, as calls that read it."""
    for flow in todo:
        runs = list(row_chunks(flow.storage, how.block_size if how else 1, CHUNK_ELEMENTS))
        for first, rows in runs:
            yield partial(_load, model, base, flow, first, rows, (first, rows) == runs[-1])


def _load(model: OpenModel, base: AlignedBase | None, flow: Flow, first: int, rows: int, last: bool) -> _Load:
    values = model.read_rows(flow.name, flow.storage, first, rows)
    fill = base.read_rows(flow.name, flow.storage, first, rows) if base is not None and flow.tensor.masked else None
    return _Load(flow, first, rows, values, fill, last)


def read_ahead(pool: Executor, calls: Iterable[Callable[[], T]], depth: int) -> Iterator[T]:
    """Results of the calls in order, up to `depth` of them made ahead of use in the pool's thread."""
    waiting: deque[Future[T]] = deque()
    try:
        for call in calls:
            waiting.append(pool.submit(call))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


class _Worker:
    """Hides, hashes and quantizes chunk after chunk; keeps the scales of the tensor that is going by."""

    def __init__(
        self, model: OpenModel, how: Quantization | None, hasher: ModelHash | None, base_hasher: ModelHash | None
    ) -> None:
        self._model = model
        self._how = how
        self._hasher = hasher
        self._base_hasher = base_hasher
        self._scales: list[Array] = []
        self._base_scales: list[Array] = []

    def chunk(self, load: _Load) -> Chunk:
        flow, x, b = load.flow, load.values, load.fill
        if b is not None and self._base_hasher is not None:
            self._base_hasher.update(flow.name, b)
            _check_finite(flow, b, "public base")
        if self._hasher is None:
            return Chunk(load.first, load.rows, x, self._fill(load, x, self._stored_scales(load)))
        self._hide(flow, load.first, x, b)
        values, scales = encode(flow, self._how, x)
        if scales is not None:
            self._scales.append(scales)
        return Chunk(load.first, load.rows, values, self._fill(load, values, scales))

    def _stored_scales(self, load: _Load) -> Array | None:
        """Block scales of rows of a model that is packed already; only a public base needs them."""
        if load.fill is None or not load.flow.storage.packed or self._how is None:
            return None
        cols, block = load.flow.storage.view[2], load.flow.storage.scale_block(self._how.block_size)
        absmax: Array = self._model.scales(load.flow.name).absmax
        return absmax[load.first * cols // block : -(-(load.first + load.rows) * cols // block)]

    def _fill(self, load: _Load, values: Array, scales: Array | None) -> Fill | None:
        if load.fill is None:
            return None
        flow = load.flow
        own, own_scales = encode(flow, self._how, load.fill, "public base")
        if own_scales is None or self._how is None or scales is None:
            return Fill(own, None)
        self._base_scales.append(own_scales)
        if not flow.storage.mixes_units(self._how.block_size):
            return Fill(own, None)
        return Fill(own, encode_with(flow, self._how, load.fill, scales))

    def scales(self, load: _Load) -> TensorScales | None:
        """Block scales of the tensor that has gone by."""
        flow, how = load.flow, self._how
        if how is None or not flow.storage.packed:
            return None
        block = 0 if flow.storage.kind == "pack8" else how.block_size
        if self._hasher is None:
            model = self._model.scales(flow.name)
        else:
            model = Scales.of(how.format, block, np.concatenate(self._scales), double=how.double_quant)
        base = Scales(how.format, block, np.concatenate(self._base_scales)) if self._base_scales else None
        self._scales, self._base_scales = [], []
        return TensorScales(model, base)

    def digests(self, todo: Sequence[Flow]) -> Digests:
        """Digests of everything that went by."""
        manifest = self._model.manifest
        model = self._hasher.hexdigest(todo) if self._hasher else manifest.model_digest if manifest else None
        if model is None:
            raise InputError("its manifest has no model digest", where=self._model.source.reference)
        return Digests(model, self._base_hasher.hexdigest(todo) if self._base_hasher else None)

    def _hide(self, flow: Flow, first: int, x: Array, b: Array | None) -> None:
        """M_H ⊙ W in place, checked and hashed; then the public base, or what became of it, goes into the holes."""
        assert self._hasher is not None
        if flow.hidden is not None:
            if b is not None and self._model.has_trained_fill:
                b = x.copy()
            flow.hidden.overwrite(x, first, None)
        if flow.storage.kind == "raw":  # whoever quantizes notices by himself
            _check_finite(flow, x, "model")
        self._hasher.update(flow.name, x)
        if flow.hidden is not None and b is not None:
            self._hasher.settle()  # it still reads x
            flow.hidden.overwrite(x, first, b)


def encode(flow: Flow, how: Quantization | None, x: Array, whose: str = "model") -> tuple[Array, Array | None]:
    """Quantize rows of a tensor as its storage says: (values or codes, block scales of packed kinds).

    Args:
        whose: "model" or "public base", for errors.

    Raises:
        InputError: a value is not finite, or beyond the range of the format.
    """
    storage, dtype = flow.storage, flow.logical.dtype
    if how is None or storage.kind == "raw":
        return x, None
    y = np.ascontiguousarray(x.T) if storage.transposed else x
    rows, cols = y.shape
    try:
        if storage.kind == "pack4":
            packed = np.empty((y.size + 1) // 2, np.uint8)
            absmax = np.empty(-(-y.size // how.block_size), np.float32)
            kernels.quantize_4bit(y, dtype, format=how.format, block=how.block_size, packed=packed, absmax=absmax)
            return packed, absmax
        if storage.kind == "pack8":
            codes, row_scales = np.empty((rows, cols), np.int8), np.empty(rows, np.float32)
            kernels.quantize_int8(y, dtype, codes, row_scales)
            return codes, row_scales
        return _snap(flow, how, y), None
    except kernels.NonFinite:
        _check_finite(flow, x, whose)
        raise InputError(f"a value is NaN, infinite, or too large for {how.format}", where=flow.name) from None


def _snap(flow: Flow, how: Quantization, y: Array) -> Array:
    """Values rounded to the grid, in the layout in which they are stored."""
    out = np.empty_like(y)
    rows, cols = y.shape
    # int8 takes one scale a row, as bitsandbytes does; down columns, which may be long, one a block like all others
    step = how.block_size if how.format == "int8" and flow.storage.geometry == "column" else max(rows, 1)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        kernels.snap(
            y[part], flow.logical.dtype, format=how.format, block=how.block_size, geometry=flow.storage.geometry,
            rows=len(y[part]), cols=cols, out=out[part],
        )  # fmt: skip
    return np.ascontiguousarray(out.T) if flow.storage.transposed else out


def encode_with(flow: Flow, how: Quantization, x: Array, scales: Array) -> Array:
    """Codes of other values under given block scales, clamped; for blocks that mix units."""
    y = np.ascontiguousarray(x.T) if flow.storage.transposed else x
    if flow.storage.kind == "pack4":
        packed = np.empty((y.size + 1) // 2, np.uint8)
        kernels.quantize_4bit_with(
            y, flow.logical.dtype, format=how.format, block=how.block_size, absmax_given=scales, packed=packed
        )
        return packed
    wide = kernels.widened(y, flow.logical.dtype).reshape(y.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint(wide * (np.float32(127) / scales[:, None]))
    return np.where(scales[:, None] > 0, np.clip(codes, -127, 127), 0).astype(np.int8)


def _check_finite(flow: Flow, x: Array, whose: str) -> None:
    if flow.logical.is_float and not kernels.all_finite(x, flow.logical.dtype):
        raise InputError(f"the {whose} holds NaN or infinity where it is visible", where=flow.name)


class ModelHash:
    """Content digest of a model: SHA-256 over its tensors' names, dtypes, shapes and SHA-256, in the order of names.

    Bytes are hashed in a background thread; the caller leaves what it handed over alone until `settle`.
    """

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._tensors: dict[str, Any] = {}
        self._pending: deque[Future[None]] = deque()

    def update(self, name: str, values: Array) -> None:
        """More bytes of a tensor, in its own order."""
        sha256 = self._tensors.setdefault(name, hashlib.sha256())
        while len(self._pending) >= 3:
            self._pending.popleft().result()
        self._pending.append(self._lane.submit(sha256.update, values.reshape(-1).view(np.uint8).data))

    def settle(self) -> None:
        """Wait until everything handed over is hashed."""
        while self._pending:
            self._pending.popleft().result()

    def hexdigest(self, todo: Sequence[Flow]) -> str:
        """The digest of all tensors that were handed over."""
        self.settle()
        logical = {flow.name: flow.logical for flow in todo}
        lines = [
            strictjson.dumps([name, logical[name].dtype, list(logical[name].shape), sha256.hexdigest()])
            for name, sha256 in sorted(self._tensors.items())
        ]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
