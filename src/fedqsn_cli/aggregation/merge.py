"""`merge`: weighted averaging of updates, unit by unit, one chunk of one tensor at a time.

    Δ_k = U_k / s_k                                   model coordinates
    Δ   = Σ n_k Δ_k / Σ n_k                           over the clients that saw the unit (normalize coverage)
                                                      or over all clients (normalize clients)
    W'  = W + η Δ                                     units that nobody saw keep their bits

FedAvg (arXiv 1602.05629) is the case without masks and quantization. Memory holds one chunk, its sum and a few chunks
read ahead, however many clients there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli import keyfile
from fedqsn_cli import ledger as ledgers
from fedqsn_cli.aggregation import accumulate
from fedqsn_cli.aggregation.update import ClientUpdate, Rows, open_updates, rows_of
from fedqsn_cli.artifacts import MODEL_MANIFEST, ModelManifest, manifest_bytes
from fedqsn_cli.checkpoint import ArtifactWriter
from fedqsn_cli.errors import InputError, KeyFileError, RefusedUpdate
from fedqsn_cli.hashing import HashThreads
from fedqsn_cli.jobmasks import ServerMasks
from fedqsn_cli.keyfile import Job
from fedqsn_cli.logical import OpenModel, open_model
from fedqsn_cli.outputs import tensor_specs
from fedqsn_cli.owner import keep_outside, shard_bytes, source_record
from fedqsn_cli.pipeline import Flow, ModelHash, flows, read_ahead
from fedqsn_cli.progress import Progress, Silent
from fedqsn_cli.residual import Residual, residual_sink
from fedqsn_cli.server_model import copy_companions
from fedqsn_cli.storage import row_chunks
from fedqsn_cli.units import UnitMask

CHUNK_ELEMENTS = 1 << 20  # its double-precision sum takes 8 MiB

Array = NDArray[Any]
Normalize = Literal["coverage", "clients"]


@dataclass(frozen=True, slots=True)
class MergedClient:
    """What one client brought.

    Args:
        share: its share of all examples. relative_norm: norm of its Δ over the norm of the visible model.
        first_loss, last_loss: as the client reported them.
    """

    client: str
    round: int
    num_examples: int
    share: float
    relative_norm: float
    first_loss: float | None
    last_loss: float | None


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What `merge` made. model_digest is that of the new model, for a server model; covered is the share of all
    parameters that at least one client saw."""

    path: str
    kind: str
    clients: tuple[MergedClient, ...]
    num_examples: int
    covered: float
    model_digest: str | None


def merge(
    source: str,
    updates: Sequence[str | Path],
    out: str | Path,
    *,
    key: str | Path,
    ledger: str | Path | None = None,
    normalize: Normalize = "coverage",
    server_lr: float = 1.0,
    restore: str | None = None,
    blend: float = 1.0,
    max_update_norm: float = 10.0,
    max_examples: int | None = None,
    max_shard_size: str = "5GB",
    force: bool = False,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge updates into the global model or the server model; or, with `restore`, end a job.

    Args:
        source: the model that the proxies were made of. updates: update directories.
        normalize: average each unit over the clients that saw it, or over all. server_lr: η.
        restore: a trained server model, whose visible units are put together with the hidden units of `source`.
        blend: λ of the restore; 1 puts hidden units back in full.
        max_update_norm: largest accepted norm of one client's Δ relative to the model's.
        max_examples: largest accepted number of examples that a client may claim.

    Raises:
        RefusedUpdate: an update is foreign, stale, doubled, malformed, non-finite or too large.
        InputError: anything else does not fit together. Nothing was written then.
    """
    from fedqsn_cli.aggregation.restore import restore_model

    keep_outside(Path(out), key=key, ledger=ledger)
    if restore is not None:
        if updates:
            raise InputError("a restore takes no updates", where="--restore", hint="merge them first")
        return restore_model(source, restore, out, key=key, blend=blend, max_shard_size=max_shard_size, force=force,
                             progress=progress or Silent())  # fmt: skip
    _check_options(updates, ledger, normalize, server_lr, blend, max_update_norm)
    assert ledger is not None
    job, model = open_job_model(source, key)
    masks = ServerMasks(job)
    releases = {release.proxy_id: release for release in ledgers.read(Path(ledger))}
    todo = flows(model, None, masks.hidden)
    with HashThreads() as hashing, ArtifactWriter(Path(out), force=force, hashed=False) as writer:
        opened = open_updates(
            [Path(folder) for folder in updates], masks=masks, plan=model.plan, releases=releases,
            ledger=Path(ledger), max_examples=max_examples, hashing=hashing,
        )  # fmt: skip
        merger = _Merger(model, opened, normalize, server_lr, hashing)
        digest = _write(merger, todo, writer, shard_bytes(max_shard_size), progress or Silent())
        _check_merged(merger, opened, source, max_update_norm, todo)
        copy_companions(model, writer)
        writer.add_bytes(MODEL_MANIFEST, manifest_bytes(merged_manifest(model, job, digest)))
        path = writer.publish()
    return _result(path, model, opened, merger, digest, todo)


def open_job_model(source: str, key: str | Path) -> tuple[Job, OpenModel]:
    """Open a dense model that belongs to the job of a key.

    Raises:
        InputError: it is quantized, carries a client mask, or belongs to another job.
    """
    job = keyfile.load(key)
    model = open_model(source, axis=job.axis, overrides=job.overrides)
    if model.is_quantized or model.kind == "masked-model":
        raise InputError("this model is on its way to a proxy", where=source, hint="give the global or server model")
    if model.plan.digest != job.plan_digest:
        raise KeyFileError("the key belongs to a job with another plan than this model's", where=key)
    if model.kind == "server-model" and model.manifest and model.manifest.job != job.commitment:
        raise KeyFileError("the key belongs to another job than this server model", where=key)
    return job, model


def merged_manifest(model: OpenModel, job: Job, digest: str | None, kind: str | None = None) -> ModelManifest:
    """`fedqsn.json` of a merged or restored model."""
    if model.manifest is not None and model.kind == "server-model" and kind is None:
        return model.manifest.model_copy(update={"model_digest": digest, "source": source_record(model)})
    return ModelManifest.model_validate(
        {
            "kind": "global-model", "job": job.commitment, "p1": job.p1, "axis": job.axis, "rescale": False,
            "fill": "zero", "public_base": None, "plan": job.plan_digest, "overrides": job.overrides,
            "model_digest": None, "quantization": None, "groups": {}, "tensors": {}, "source": source_record(model),
        }
    )  # fmt: skip


def _check_options(
    updates: Sequence[object],
    ledger: object,
    normalize: str,
    server_lr: float,
    blend: float,
    max_update_norm: float,
) -> None:
    if not updates:
        raise InputError("no update was given", hint="name the update directories, or end the job with --restore")
    if ledger is None:
        raise InputError("merging updates needs the ledger of their releases", where="--ledger")
    if normalize not in {"coverage", "clients"}:
        raise InputError(f"unknown normalization {normalize!r}", where="--normalize", hint="coverage or clients")
    if not (math.isfinite(server_lr) and server_lr > 0):
        raise InputError(f"{server_lr} is not a learning rate", where="--server-lr", hint="a number above 0")
    if not max_update_norm > 0:
        raise InputError(f"{max_update_norm} is not a norm", where="--max-update-norm", hint="a number above 0")
    if blend != 1.0:
        raise InputError("only a restore blends", where="--blend", hint="use it with --restore")


@dataclass(frozen=True, slots=True)
class _Piece:
    """What was read for a chunk: the model's own rows (client None), or the rows of one update."""

    flow: Flow
    first: int
    rows: int
    values: Array
    residual: Array | None
    update: ClientUpdate | None
    seen: Rows | None
    last: bool  # nothing more comes for this chunk


class _Merger:
    """Reads the model and all updates in step, and keeps the sum of the chunk that is going by."""

    def __init__(
        self, model: OpenModel, updates: Sequence[ClientUpdate], normalize: Normalize, rate: float,
        hashing: HashThreads,
    ) -> None:
        self.model = model
        self.updates = updates
        self.examples = sum(update.manifest.num_examples for update in updates)
        self.squares = 0.0  # of the server-visible weights
        self.before = ModelHash(hashing.lane())
        self.after = ModelHash(hashing.lane()) if model.kind == "server-model" else None
        self.covered = 0
        self._normalize = normalize
        self._rate = rate
        self._residual = Residual(model)
        self._visible: tuple[str, dict[str, UnitMask | None]] = ("", {})
        self._sums = np.empty(0)
        self._total: NDArray[np.float64] = np.empty((0, 0))
        self._weights = np.empty(0)

    def pieces(self, todo: Sequence[Flow]) -> Iterator[Callable[[], _Piece]]:
        """Everything there is to read, in the order in which it is needed, as calls that read it."""
        for flow in todo:
            trained = flow.logical.is_float
            for first, rows in row_chunks(flow.storage, 1, CHUNK_ELEMENTS):
                yield partial(self._own, flow, first, rows, last=not trained)
                for update in self.updates if trained else ():
                    yield partial(self._sent, flow, first, rows, update, last=update is self.updates[-1])

    def _own(self, flow: Flow, first: int, rows: int, *, last: bool) -> _Piece:
        values = self.model.read_rows(flow.name, flow.storage, first, rows)
        residual = None
        if flow.logical.dtype in {"F16", "BF16"}:
            residual = self._residual.rows(flow.name, first, rows, flow.storage.view[2])
        return _Piece(flow, first, rows, values, residual, None, None, last)

    def _sent(self, flow: Flow, first: int, rows: int, update: ClientUpdate, *, last: bool) -> _Piece:
        visible = self._mask(flow, update)
        cols = flow.storage.view[2]
        seen = rows_of(visible, first, rows) if visible else Rows(first * cols, rows * cols, np.empty(0, np.int64))
        values = update.read(flow.name, seen.first, seen.count)
        return _Piece(flow, first, rows, values, None, update, seen, last)

    def _mask(self, flow: Flow, update: ClientUpdate) -> UnitMask | None:
        """What the client saw of the tensor; kept while the tensor goes by."""
        if self._visible[0] != flow.name:
            self._visible = (flow.name, {})
        masks = self._visible[1]
        if update.client not in masks:
            masks[update.client] = update.masks.visible(flow.tensor)
        return masks[update.client]

    def begin(self, piece: _Piece) -> None:
        """Start a chunk with the model's own rows: check, hash, and clear the sum."""
        flow = piece.flow
        visible = piece.values.copy()  # the rows themselves will move while these are hashed
        if flow.hidden is not None:
            flow.hidden.overwrite(visible, piece.first, None)
        self.before.update(flow.name, visible)
        if flow.logical.is_float:
            self.squares += accumulate.sum_of_squares(visible, flow.logical.dtype)
            if self._sums.size < visible.size:
                self._sums = np.empty(visible.size)
            self._total = self._sums[: visible.size].reshape(visible.shape)
            self._total[:] = 0
            units = {None: 1, "row": piece.rows, "column": visible.shape[1], "element": visible.size}
            self._weights = np.zeros(units[flow.tensor.axis])

    def add(self, piece: _Piece) -> None:
        """Add one client's rows to the sum."""
        update, seen = piece.update, piece.seen
        assert update is not None and seen is not None
        tensor = piece.flow.tensor
        coefficient = update.coefficient(tensor)
        squares = accumulate.add(self._total, piece.values, update.dtype, seen.index, tensor.axis, coefficient)
        if not math.isfinite(squares):
            raise RefusedUpdate("holds NaN or infinity", where=f"{update.folder}: {tensor.name}")
        update.squares += squares / float(update.masks.factor(tensor)) ** 2
        self._weights[seen.index if tensor.axis else slice(None)] += update.manifest.num_examples

    def step(self, own: _Piece) -> None:
        """Move the model's rows in place."""
        flow = own.flow
        weights = self._weights
        self.covered += int(np.count_nonzero(weights)) * (own.values.size // max(1, weights.size))
        if self._normalize == "clients":
            weights = np.where(weights > 0, float(self.examples), 0.0)
        bad = accumulate.step(
            own.values, own.residual, flow.logical.dtype, self._total, weights, flow.tensor.axis, self._rate
        )
        if bad:
            raise RefusedUpdate(
                f"the merged tensor would hold {bad} infinite or NaN values",
                where=flow.name,
                hint="an update is poisoned, or --server-lr is too large",
            )

    def end(self, own: _Piece) -> None:
        """Hash the new rows as the next export will, where the manifest tells their digest."""
        if self.after is None:
            return
        visible = own.values
        if own.flow.hidden is not None:
            visible = own.values.copy()
            own.flow.hidden.overwrite(visible, own.first, None)
        self.after.update(own.flow.name, visible)


def _write(merger: _Merger, todo: Sequence[Flow], writer: ArtifactWriter, limit: int, progress: Progress) -> str | None:
    """Stream the model through the merger into the writer; returns the digest of a new server model."""
    specs = tensor_specs(todo, None)
    metadata = merger.model.checkpoint.metadata
    sink = writer.tensors("model", specs, max_shard_bytes=limit, metadata=metadata)
    rest = residual_sink(writer, merger.model.plan.tensors, None)
    progress.start("merging", merger.model.checkpoint.total_bytes, "bytes")
    own: _Piece | None = None
    with ThreadPoolExecutor(1) as reader:
        for piece in read_ahead(reader, merger.pieces(todo), depth=3):
            if piece.update is None:
                own = piece
                merger.begin(piece)
            else:
                merger.add(piece)
            if not piece.last:
                continue
            assert own is not None
            if own.flow.logical.is_float:
                merger.step(own)
            merger.end(own)
            offset = own.first * own.flow.storage.view[2]
            sink.write(own.flow.name, offset * own.values.itemsize, own.values)
            if rest is not None and own.residual is not None:
                rest.write(own.flow.name, offset * 2, own.residual)
            progress.advance(own.values.nbytes)
    progress.finish()
    sink.close()
    if rest is not None:
        rest.close()
    return merger.after.hexdigest(todo) if merger.after else None


def _check_merged(
    merger: _Merger, updates: Sequence[ClientUpdate], source: str, max_update_norm: float, todo: Sequence[Flow]
) -> None:
    """What can only be known once everything went by."""
    if merger.before.hexdigest(todo) != updates[0].release.model_digest:
        raise RefusedUpdate(
            "the updates were trained on proxies of another model",
            where=source,
            hint="give the model that this round's proxies were exported from",
        )
    for update in updates:
        update.finish()
        norm = _relative(update, merger)
        if norm > max_update_norm:
            raise RefusedUpdate(
                f"its norm is {norm:.3g} times the model's, over --max-update-norm {max_update_norm:g}",
                where=update.folder,
            )


def _relative(update: ClientUpdate, merger: _Merger) -> float:
    return math.sqrt(update.squares / merger.squares) if merger.squares else 0.0


def _result(
    path: Path, model: OpenModel, updates: Sequence[ClientUpdate], merger: _Merger, digest: str | None,
    todo: Sequence[Flow],
) -> MergeResult:  # fmt: skip
    clients = tuple(
        MergedClient(
            client=update.client,
            round=update.release.round,
            num_examples=update.manifest.num_examples,
            share=update.manifest.num_examples / merger.examples,
            relative_norm=_relative(update, merger),
            first_loss=update.manifest.losses.first,
            last_loss=update.manifest.losses.last,
        )
        for update in updates
    )
    covered = merger.covered / sum(flow.size for flow in todo)
    return MergeResult(str(path), model.kind, clients, merger.examples, covered, digest)
