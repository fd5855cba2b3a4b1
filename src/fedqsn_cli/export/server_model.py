"""`mask` and `quantize`: the owner's models on the way to a proxy, one step at a time.

global model ──mask──▶ server model ──quantize──▶ quantized server model ──mask --client──▶ the proxy's weights
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedqsn_cli.artifacts.manifests import MODEL_MANIFEST, Quantization, manifest_bytes, require_same_kind
from fedqsn_cli.checkpoint import ArtifactWriter
from fedqsn_cli.checkpoint.files import keep_outside
from fedqsn_cli.errors import InputError
from fedqsn_cli.export.advice import refuse_untrainable, tell_what_stays
from fedqsn_cli.export.companions import copy_companions, write_public_companions
from fedqsn_cli.export.outputs import METADATA, ServerOutput, client_output, tensor_specs
from fedqsn_cli.export.pipeline import run
from fedqsn_cli.export.records import masked_manifest, quantized_manifest
from fedqsn_cli.export.session import open_session
from fedqsn_cli.kernels.digests import algorithm_of
from fedqsn_cli.models.model import OpenModel, open_model
from fedqsn_cli.models.plan_file import load_overrides
from fedqsn_cli.models.residual import copy_residual
from fedqsn_cli.models.tensor_task import tensor_tasks
from fedqsn_cli.options import MaskOptions, QuantizeOptions
from fedqsn_cli.progress import SILENT, Progress
from fedqsn_cli.quantization import layout


@dataclass(frozen=True, slots=True)
class MaskResult:
    """What `mask` made.

    Args:
        hidden: share of all parameters that are hidden in it.
        key_created: a new job key was written.
        public_base: how many masked tensors of it are exact, resized and so on (see `models.public_base`); None for
            zero fill.
    """

    path: str
    kind: str
    model_digest: str
    groups: int
    hidden: float
    key_created: bool
    public_base: dict[str, int] | None = None


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """What `quantize` made; shares as in `layout.clear_shares`."""

    path: str
    quantization: Quantization | None
    shares: dict[str, float]


def mask(source: str | Path, options: MaskOptions, *, progress: Progress = SILENT) -> MaskResult:
    """Hide the job's units of a global model, or, with `client`, one client's units of a server model.

    Hidden units are physically absent: zero, or the public base. Visible weights stay bit-equal; only a client mask
    folds the rescale factor n / |V| in. With `client` the weights are those of `export_proxy`, but nothing is released:
    the result is not in a ledger, and updates for it are refused.

    Args:
        source: the global model, or, with `client`, a server model.
        options: see `MaskOptions`.
        progress: told of bytes.

    Raises:
        InputError: anything does not fit together; nothing was written then.

    Example:
        >>> mask("global/", "server/", key="job.key", p1=0.1).hidden
    """
    keep_outside(Path(options.out), key=options.key)
    session = open_session(source, options)
    model, quantization = session.model, session.stored_quantization
    if options.client is None and model.kind != "global-model":
        raise InputError("this is a server model already", where=source, hint="name a --client to hide more")
    refuse_untrainable(model, options.allow_untrainable)
    masks = session.client_masks(options.client, options) if options.client is not None else None
    tasks = session.tasks(quantization)
    kind: Literal["server-model", "masked-model"] = "server-model" if masks is None else "masked-model"
    require_same_kind(options.out, kind, quantization)
    with ArtifactWriter(Path(options.out), force=options.force, replaces=[MODEL_MANIFEST], digest=None) as writer:
        specs = tensor_specs(tasks, quantization)
        sink = writer.tensors("model", specs, max_shard_bytes=options.max_shard_bytes, metadata=METADATA)
        output = client_output(sink, quantization, masks) if masks is not None else ServerOutput(sink, quantization)
        digests = run(model, tasks, quantization, [output], base=session.base, progress=progress)
        sink.close()
        if masks is None:
            copy_residual(model, writer, session.masks.hidden)
            copy_companions(model, writer)
        else:
            write_public_companions(model, writer, quantization)
        manifest = masked_manifest(session, kind, digests)
        writer.add_bytes(MODEL_MANIFEST, manifest_bytes(manifest))
        tell_what_stays(model, progress)
        session.save_key()
        path = writer.publish()
    by_server = sum(map(session.masks.hidden_elements, model.plan.tensors))
    by_client = sum(map(masks.hidden_elements, model.plan.tensors)) if masks is not None else 0
    return MaskResult(
        path=str(path),
        kind=manifest.kind,
        model_digest=digests.model,
        groups=len(model.plan.groups()),
        hidden=(by_server + by_client) / sum(task.size for task in tasks),
        key_created=session.new_key,
        public_base=session.base.counts() if session.base is not None else None,
    )


def quantize(source: str | Path, options: QuantizeOptions, *, progress: Progress = SILENT) -> QuantizeResult:
    """Quantize a global model or a server model block by block (absmax).

    Args:
        source: the model.
        options: see `QuantizeOptions`. A plan file is for a model that was not masked; a server model brings its own.
        progress: told of bytes.

    Raises:
        InputError: anything does not fit together; nothing was written then.

    Example:
        >>> quantize("server/", "server-nf4/", format="nf4").shares
    """
    quantization = layout.quantization(
        options.format, block_size=options.block_size, double_quant=options.double_quant, layout=options.layout
    )
    model = _open_dense(source, options.plan_file)
    tasks = tensor_tasks(model, quantization, lambda tensor: None)
    algorithm = algorithm_of(model.manifest.model_digest if model.manifest else None)
    require_same_kind(options.out, model.kind, quantization)
    with ArtifactWriter(Path(options.out), force=options.force, replaces=[MODEL_MANIFEST], digest=None) as writer:
        specs = tensor_specs(tasks, quantization)
        sink = writer.tensors("model", specs, max_shard_bytes=options.max_shard_bytes, metadata=METADATA)
        digests = run(
            model,
            tasks,
            quantization,
            [ServerOutput(sink, quantization)],
            base=None,
            algorithm=algorithm,
            progress=progress,
        )
        sink.close()
        copy_companions(model, writer, quantization)
        writer.add_bytes(MODEL_MANIFEST, manifest_bytes(quantized_manifest(model, digests.model, quantization)))
        path = writer.publish()
    return QuantizeResult(str(path), quantization, layout.clear_shares(model.plan.tensors, quantization))


def _open_dense(source: str | Path, plan_file: str | Path | None) -> OpenModel:
    """Open a global or server model that can be quantized. Raises InputError."""
    model = open_model(str(source), overrides=load_overrides(plan_file) if plan_file is not None else None)
    if model.is_quantized:
        raise InputError("the model is quantized already", where=source)
    if model.kind == "masked-model":
        raise InputError("this model carries a client mask", where=source, hint="quantize the server model first")
    if plan_file is not None and model.kind == "server-model":
        raise InputError("a server model brings its own plan", where="--plan-file")
    model.plan.require_known()
    return model
