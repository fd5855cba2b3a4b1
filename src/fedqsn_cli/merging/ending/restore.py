"""The end of a job: the trained visible part and the hidden part, which never left, become one model again.

λ = 1    the paper's "logical AND": visible units from the trained server model, hidden ones from the global model
λ < 1    hidden units R + λ (W_h − R), R = 0 or the public base; visible units times s + λ (1 − s)
λ = 0    the trained server model itself, its scale folded in

Where clients trained the fill, too, the server model holds R' for hidden units, and they become R' + λ (W_h − R): what
was learnt there, R' − R, is added to the hidden weights as it is to visible ones (task arithmetic, arXiv 2212.04089).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from fedqsn_cli.artifacts.manifests import MODEL_MANIFEST, ModelManifest, merged_before, require_same_kind
from fedqsn_cli.checkpoint import ArtifactWriter
from fedqsn_cli.dtypes import SHORT_DTYPES
from fedqsn_cli.errors import InputError
from fedqsn_cli.export.outputs import tensor_specs
from fedqsn_cli.export.pipeline import CHUNK_ELEMENTS
from fedqsn_cli.kernels.hash_threads import HashThreads
from fedqsn_cli.masks.draw import rescale_factor
from fedqsn_cli.masks.job_key import JobKey
from fedqsn_cli.masks.job_masks import ServerMasks
from fedqsn_cli.merging.ending.line_search import Search, best_blend
from fedqsn_cli.merging.job_model import merged_manifest, model_sinks, open_job_model, publish
from fedqsn_cli.merging.results import MergeResult
from fedqsn_cli.merging.step.chunks import InMemorySink, ModelChunk, Sink, Weights, write_chunks
from fedqsn_cli.merging.sums.arithmetic import add_difference, mix
from fedqsn_cli.models.digest import ModelHash
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.models.public_base import PublicBase, open_base
from fedqsn_cli.models.residual import Residual
from fedqsn_cli.models.tensor_task import TensorTask, tensor_tasks
from fedqsn_cli.options import MergeOptions
from fedqsn_cli.progress import Progress
from fedqsn_cli.quantization.layout import row_chunks

if TYPE_CHECKING:
    from fedqsn_cli.merging.ending.interpolate import DevelopmentSet

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
    inputs = open_restore_inputs(source, trained, options)
    with ArtifactWriter(Path(options.out), force=options.force, replaces=[MODEL_MANIFEST], digest=None) as writer:
        search = _search(inputs, development, progress) if development is not None else None
        blend = search.chosen if search else float(options.blend)
        path = write_restored(writer, inputs, blend, options.max_shard_bytes, progress)
    return MergeResult(path, "global-model", (), 0, 0.0, None, blend=blend, search=search)


@dataclass(frozen=True, slots=True)
class RestoreInputs:
    """What is put together.

    Args:
        job: the job of both. whole: the global model. server: the trained server model. manifest: of the server model.
        tasks: the tensors of both, in order.
        base: R, where clients trained it to R'.
        residuals: of the global and of the server model.
    """

    job: JobKey
    whole: OpenModel
    server: OpenModel
    manifest: ModelManifest
    tasks: Sequence[TensorTask]
    base: PublicBase | None
    residuals: tuple[Residual, Residual]

    @property
    def merged(self) -> frozenset[str]:
        """Which updates are in the server model."""
        return merged_before(self.manifest, self.job.commitment)

    def has_residual(self, blend: float) -> bool:
        """Whether the restored model has a residual: at λ = 1 its weights are those of the two models."""
        return blend == 1 and self.base is None and any(residual.exists for residual in self.residuals)

    def scale(self, task: TensorTask) -> float:
        """s of a masked tensor: the rescale factor of the server mask, or 1."""
        if not self.manifest.rescale:
            return 1.0
        return float(rescale_factor(task.plan.units, self.job.hides(task.plan.groups[0], task.plan.units), 0))


def open_restore_inputs(source: str | Path, trained: str | Path, options: MergeOptions) -> RestoreInputs:
    """Open both models and the public base.

    Raises:
        InputError: they do not belong together, or the output would replace a model of another kind.
    """
    job, whole = open_job_model(source, options.key)
    _, server = open_job_model(trained, options.key)
    if whole.kind != "global-model":
        raise InputError("this is a server model", where=source, hint="give the global model")
    if server.manifest is None or server.kind != "server-model":
        raise InputError("this is not a server model", where=trained, hint="it is made by 'fedqsn mask'")
    require_same_kind(options.out, whole.kind)
    _check_same_shapes(whole, server, trained)
    tasks = tensor_tasks(whole, None, ServerMasks(job).hidden)
    base = None
    if server.has_trained_fill:
        base = _open_base(options.public_base, whole, server.manifest, tasks, whole_model=job.sends_nothing)
    elif options.public_base is not None:
        raise InputError("no client trained the public base in this job", where="--public-base")
    residuals = Residual(whole), Residual(server)
    return RestoreInputs(job, whole, server, server.manifest, tasks, base, residuals)


def _check_same_shapes(whole: OpenModel, server: OpenModel, trained: str | Path) -> None:
    for name, tensor in whole.tensors.items():
        other = server.tensors.get(name)
        if other is None or (other.dtype, other.shape) != (tensor.dtype, tensor.shape):
            raise InputError("the two models differ in this tensor", where=f"{trained}: {name}")
    if len(server.tensors) != len(whole.tensors):
        raise InputError("the two models do not have the same tensors", where=trained)


def _open_base(
    reference: str | Path | None,
    whole: OpenModel,
    manifest: ModelManifest,
    tasks: Sequence[TensorTask],
    *,
    whole_model: bool,
) -> PublicBase:
    """The public base of a job in which clients trained it, too.

    Raises:
        InputError: it is missing, or not the one that the server model was filled with.
    """
    if reference is None:
        raise InputError(
            "clients trained the public base, so the restore needs it",
            where="--public-base",
            hint="give the one that the server model was filled with",
        )
    base = open_base(str(reference), whole, whole=whole_model)
    if manifest.public_base is None or _digest(tasks, base) != manifest.public_base.sha256:
        raise InputError("not the public base that the server model was filled with", where="--public-base")
    return base


def _digest(tasks: Sequence[TensorTask], base: PublicBase) -> str:
    """The digest of a public base as a pass over a model computes it: over the values for masked tensors."""
    with HashThreads() as hashing:
        hasher = ModelHash(hashing.queue(), "sha256")
        for task in tasks:
            if base.fills(task.plan):
                for first, rows in row_chunks(task.layout, 1, CHUNK_ELEMENTS):
                    hasher.update(task.name, base.read_rows(task.name, task.layout, first, rows))
        return hasher.digest(tasks)


def _search(inputs: RestoreInputs, development: DevelopmentSet, progress: Progress) -> Search:
    """λ with the lowest loss; the restored model is exactly linear in λ, so its two ends determine all of it."""
    from fedqsn_cli.merging.ending.interpolate import Interpolation

    ends = []
    for blend in (0.0, 1.0):
        end = Weights(InMemorySink(tensor_specs(inputs.tasks, None)), InMemorySink([]))
        restore_into(end.stored, None, inputs, blend, progress)
        ends.append(end)
    line = Interpolation(inputs.whole.checkpoint, ends[0], ends[1], development, progress)
    return best_blend(line.measure, line.examples, progress)


def write_restored(
    writer: ArtifactWriter, inputs: RestoreInputs, blend: float, max_shard_bytes: int, progress: Progress
) -> str:
    """Write and publish the restored model. Returns its path."""
    whole, with_residual = inputs.whole, inputs.has_residual(blend)
    with model_sinks(writer, whole, inputs.tasks, max_shard_bytes, with_residual=with_residual) as (sink, residual):
        restore_into(sink, residual, inputs, blend, progress)
    return publish(writer, whole, merged_manifest(whole, inputs.job, added=inputs.merged))


def restore_into(
    sink: Sink, residual_sink: Sink | None, inputs: RestoreInputs, blend: float, progress: Progress
) -> None:
    """Write the restored model into sinks for weights and residual, chunk by chunk."""
    progress.start("restoring", inputs.whole.checkpoint.total_bytes, "bytes")
    chunks = restored_chunks(inputs, blend, with_residual=residual_sink is not None)
    write_chunks(chunks, sink, residual_sink, progress)


def restored_chunks(inputs: RestoreInputs, blend: float, *, with_residual: bool) -> Iterator[ModelChunk]:
    """The chunks of the restored model, in order."""
    for task in inputs.tasks:
        short = task.tensor.dtype in SHORT_DTYPES
        for first, rows in row_chunks(task.layout, 1, CHUNK_ELEMENTS):
            values = _rows(inputs, task, first, rows, blend)
            residual = _residual_rows(inputs, task, first, rows) if with_residual and short else None
            yield ModelChunk(task, first, rows, values, residual)


def _rows(inputs: RestoreInputs, task: TensorTask, first: int, rows: int, blend: float) -> Array:
    """Rows of the restored tensor, as stored bits [rows, cols]."""
    dtype, hidden = task.tensor.dtype, task.hidden
    values = inputs.server.read_rows(task.name, task.layout, first, rows)
    if hidden is None or (inputs.base is not None and blend == 0):
        return values
    full = inputs.whole.read_rows(task.name, task.layout, first, rows)
    if inputs.base is not None:
        base = inputs.base.read_rows(task.name, task.layout, first, rows)
        full = add_difference(values, blend, full, base, dtype)
    elif blend < 1:
        # The server model holds R for hidden units. Nothing is 0 times a hidden weight, which may be infinite.
        full = mix(full, blend, values, 1.0 - blend, dtype) if blend > 0 else values
        s = inputs.scale(task)
        values = mix(values, s + blend * (1.0 - s), values, 0.0, dtype)
    hidden.overwrite(values, first, full)
    return values


def _residual_rows(inputs: RestoreInputs, task: TensorTask, first: int, rows: int) -> Array:
    """Rows of the residual: that of the server model, and that of the global model for hidden units."""
    whole, server = inputs.residuals
    cols, hidden = task.layout.view[2], task.hidden
    values = server.rows(task.name, first, rows, cols)
    if hidden is not None:
        hidden.overwrite(values, first, whole.rows(task.name, first, rows, cols))
    return values
