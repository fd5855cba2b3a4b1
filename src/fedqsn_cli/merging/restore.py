"""The end of a job: the trained visible part and the hidden part, which never left, become one model again.

λ = 1    the paper's "logical AND": visible units from the trained server model, hidden ones from the global model
λ < 1    hidden units R + λ (W_h − R), R = 0 or the public base; visible units times s + λ (1 − s)
λ = 0    the trained server model itself, its scale folded in

Where clients trained the fill, too, the server model holds R' for hidden units, and they become R' + λ (W_h − R): what
was learnt there, R' − R, is added to the hidden weights as it is to visible ones (task arithmetic, arXiv 2212.04089).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.artifacts.manifests import MODEL_MANIFEST, manifest_bytes
from fedqsn_cli.checkpoint import ArtifactWriter
from fedqsn_cli.dtypes import SHORT_DTYPES
from fedqsn_cli.errors import InputError
from fedqsn_cli.export.companions import copy_companions
from fedqsn_cli.export.outputs import tensor_specs
from fedqsn_cli.export.pipeline import CHUNK_ELEMENTS
from fedqsn_cli.kernels.hash_threads import HashThreads
from fedqsn_cli.masks.draw import rescale_factor
from fedqsn_cli.masks.job_masks import ServerMasks
from fedqsn_cli.merging.arithmetic import mix, moved
from fedqsn_cli.merging.chunks import InMemorySink, Sink, Weights
from fedqsn_cli.merging.job_model import merged_manifest, open_job_model
from fedqsn_cli.merging.line_search import Search, best_blend
from fedqsn_cli.merging.results import MergeResult
from fedqsn_cli.models.digest import ModelHash
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.models.public_base import PublicBase, open_base
from fedqsn_cli.models.residual import Residual, residual_sink
from fedqsn_cli.models.tensor_task import TensorTask, tensor_tasks
from fedqsn_cli.options import MergeOptions
from fedqsn_cli.progress import Progress
from fedqsn_cli.quantization.layout import row_chunks

if TYPE_CHECKING:
    from fedqsn_cli.merging.interpolate import DevelopmentSet

Array = NDArray[Any]


def restore_model(
    source: str | Path,
    trained: str | Path,
    options: MergeOptions,
    development: DevelopmentSet | None,
    *,
    progress: Progress,
) -> MergeResult:
    """Put a trained server model and the hidden units of the global model together.

    Args:
        source: the global model. trained: the server model that the job ended with.
        options: of the merge; `public_base` is R, needed where clients trained the fill, and `blend` λ, 0 to 1 or auto.
        development: where auto looks for the lowest loss.

    Raises:
        InputError: the two models do not belong together. Nothing was written then.
    """
    out, key, public_base, blend = options.out, options.key, options.public_base, options.blend
    source, trained = str(source), str(trained)
    job, whole = open_job_model(source, key)
    _, server = open_job_model(trained, key)
    if whole.kind != "global-model":
        raise InputError("this is a server model", where=source, hint="give the global model")
    if server.kind != "server-model":
        raise InputError("this is not a server model", where=trained, hint="it is made by 'fedqsn mask'")
    _check_same_shapes(whole, server, trained)
    masks = ServerMasks(job)
    tasks = tensor_tasks(whole, None, masks.hidden)
    base = _base(tasks, whole, server, str(public_base) if public_base is not None else None)
    inputs = RestoreInputs(whole, server, base)
    with ArtifactWriter(Path(out), force=options.force, hashed=False) as writer:
        search = _search(tasks, inputs, development, progress) if development is not None else None
        chosen = search.chosen if search else float(blend)
        specs = tensor_specs(tasks, None)
        sink = writer.tensors(
            "model", specs, max_shard_bytes=options.max_shard_bytes, metadata=whole.checkpoint.metadata
        )
        keeps = chosen == 1 and base is None and any(Residual(model).exists for model in (whole, server))
        residual = residual_sink(writer, whole.plan.tensors, None) if keeps else None
        _restore_into(sink, residual, tasks, inputs, chosen, progress)
        sink.close()
        if residual is not None:
            residual.close()
        copy_companions(whole, writer)
        writer.add_bytes(MODEL_MANIFEST, manifest_bytes(merged_manifest(whole, job, None, "global-model")))
        path = writer.publish()
    return MergeResult(str(path), "global-model", (), 0, 0.0, None, blend=chosen, search=search)


@dataclass(frozen=True, slots=True)
class RestoreInputs:
    """What is put together: the global model, the trained server model, and R where clients trained it to R'."""

    whole: OpenModel
    server: OpenModel
    base: PublicBase | None


def _base(tasks: Sequence[TensorTask], whole: OpenModel, server: OpenModel, reference: str | None) -> PublicBase | None:
    """The public base of a job in which clients trained it, too.

    Raises:
        InputError: it is missing, or not wanted, or not the one that the server model was filled with.
    """
    assert server.manifest is not None
    if not server.has_trained_fill:
        if reference is not None:
            raise InputError("no client trained the public base in this job", where="--public-base")
        return None
    if reference is None:
        raise InputError(
            "clients trained the public base in the holes, too; what it was before is needed", where="--public-base"
        )
    base = open_base(reference, whole)
    recorded = server.manifest.public_base
    if recorded is None or _digest(tasks, base) != recorded.sha256:
        raise InputError("not the public base that the server model was filled with", where="--public-base")
    return base


def _digest(tasks: Sequence[TensorTask], base: PublicBase) -> str:
    """The digest of a public base as a pass over a model computes it: over the values for masked tensors."""
    with HashThreads() as hashing:
        hasher = ModelHash(hashing.queue())
        for task in tasks:
            if task.plan.masked:
                for first, rows in row_chunks(task.layout, 1, CHUNK_ELEMENTS):
                    hasher.update(task.name, base.read_rows(task.name, task.layout, first, rows))
        return hasher.hexdigest(tasks)


def _search(
    tasks: Sequence[TensorTask], inputs: RestoreInputs, development: DevelopmentSet, progress: Progress
) -> Search:
    """λ with the lowest loss; the restored model is exactly linear in λ, so its two ends determine all of it."""
    from fedqsn_cli.merging.interpolate import Interpolation

    ends = []
    for blend in (0.0, 1.0):
        end = Weights(InMemorySink(tensor_specs(tasks, None)), InMemorySink([]))
        _restore_into(end.stored, None, tasks, inputs, blend, progress)
        ends.append(end)
    line = Interpolation(inputs.whole.checkpoint, ends[0], ends[1], development, progress)
    return best_blend(line.measure, line.examples, progress)


def _restore_into(
    sink: Sink,
    residual: Sink | None,
    tasks: Sequence[TensorTask],
    inputs: RestoreInputs,
    blend: float,
    progress: Progress,
) -> None:
    """Write the restored model into sinks for weights and residual, chunk by chunk."""
    residuals = Residual(inputs.whole), Residual(inputs.server)
    progress.start("restoring", inputs.whole.checkpoint.total_bytes, "bytes")
    for task in tasks:
        for first, rows in row_chunks(task.layout, 1, CHUNK_ELEMENTS):
            values = _rows(task, first, rows, inputs, blend)
            offset = first * task.layout.view[2]
            sink.write(task.name, offset * values.itemsize, values)
            if residual is not None and task.tensor.dtype in SHORT_DTYPES:
                residual.write(task.name, offset * 2, _residual_rows(task, first, rows, *residuals))
            progress.advance(values.nbytes)
    progress.finish()


def _check_same_shapes(whole: OpenModel, server: OpenModel, trained: str) -> None:
    for name, tensor in whole.tensors.items():
        other = server.tensors.get(name)
        if other is None or (other.dtype, other.shape) != (tensor.dtype, tensor.shape):
            raise InputError("the two models differ in this tensor", where=f"{trained}: {name}")
    if len(server.tensors) != len(whole.tensors):
        raise InputError("the two models do not have the same tensors", where=trained)


def _rows(task: TensorTask, first: int, rows: int, inputs: RestoreInputs, blend: float) -> Array:
    """Rows of the restored tensor, as stored bits."""
    server, dtype = inputs.server, task.tensor.dtype
    values = server.read_rows(task.name, task.layout, first, rows)
    if task.hidden is None:
        return values
    full = inputs.whole.read_rows(task.name, task.layout, first, rows)
    if inputs.base is not None:
        if blend > 0:
            base = inputs.base.read_rows(task.name, task.layout, first, rows)
            task.hidden.overwrite(values, first, moved(values, blend, full, base, dtype))
        return values
    if blend < 1:
        assert server.manifest is not None
        s = 1.0
        if server.manifest.rescale:
            s = float(rescale_factor(task.plan.units, server.manifest.groups[task.plan.groups[0]].hidden, 0))
        # In the holes, values are R. Nothing is 0 times a hidden weight, which may be infinite.
        full = mix(full, blend, values, 1.0 - blend, dtype) if blend > 0 else values
        values = mix(values, s + blend * (1.0 - s), values, 0.0, dtype)
    task.hidden.overwrite(values, first, full)
    return values


def _residual_rows(task: TensorTask, first: int, rows: int, whole: Residual, server: Residual) -> Array:
    cols = task.layout.view[2]
    values = server.rows(task.name, first, rows, cols)
    if task.hidden is not None:
        task.hidden.overwrite(values, first, whole.rows(task.name, first, rows, cols))
    return np.ascontiguousarray(values)
