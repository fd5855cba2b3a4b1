"""`mask` and `quantize`: the owner's models on the way to a proxy, one step at a time.

global model ──mask──▶ server model ──quantize──▶ quantized server model ──mask --client──▶ the proxy's weights
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedqsn_cli import strictjson
from fedqsn_cli.artifacts.manifests import MODEL_MANIFEST, ModelManifest, Quantization, manifest_bytes
from fedqsn_cli.checkpoint import ArtifactWriter
from fedqsn_cli.errors import InputError
from fedqsn_cli.export.outputs import ClientOutput, ServerOutput, tensor_specs
from fedqsn_cli.export.pipeline import Digests, run
from fedqsn_cli.export.proxy import write_companions
from fedqsn_cli.export.session import METADATA, keep_outside, model_manifest, open_session, source_record
from fedqsn_cli.masks.job_masks import ClientMasks
from fedqsn_cli.models.model import OpenModel, open_model
from fedqsn_cli.models.residual import copy_residual
from fedqsn_cli.models.tensor_task import tensor_tasks
from fedqsn_cli.options import MaskOptions, QuantizeOptions
from fedqsn_cli.planning.overrides import load_overrides
from fedqsn_cli.progress import SILENT, Progress
from fedqsn_cli.quantization.bnb_format import quantization_config
from fedqsn_cli.quantization.layout import clear_shares, quantization


@dataclass(frozen=True, slots=True)
class MaskResult:
    """What `mask` made.

    Args:
        hidden: share of all parameters that are hidden in it.
        key_created: a new job key was written.
        public_base: how many masked tensors of it are exact, resized and so on (see `bases`); None for zero fill.
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
    """What `quantize` made; shares as in `storage.clear_shares`."""

    path: str
    quantization: Quantization | None
    shares: dict[str, float]


def mask(source: str | Path, options: MaskOptions, *, progress: Progress = SILENT) -> MaskResult:
    """Hide the job's units of a global model, or, with `client`, one client's units of a server model.

    Hidden units are physically absent: zero, or the public base. Visible weights stay bit-equal; only a client mask
    folds the scale n / |V| in. With `client` the weights are those of `export_proxy`, but nothing is released: the
    result is not in a ledger, and updates for it are refused.

    Args:
        source: the global model, or, with `client`, a server model.
        options: see `MaskOptions`.
        progress: told of bytes.

    Raises:
        InputError: anything does not fit together; nothing was written then.

    Example:
        >>> mask("global/", "server/", key="job.key", p1=0.1).hidden
    """
    client = options.client
    keep_outside(Path(options.out), key=options.key)
    session = open_session(source, options)
    how = session.model.manifest.quantization if session.model.manifest else None
    if client is None and session.model.kind != "global-model":
        raise InputError("this is a server model already", where=source, hint="name a --client to hide more")
    tasks = tensor_tasks(session.model, how, session.masks.hidden)
    with ArtifactWriter(Path(options.out), force=options.force, hashed=False) as writer:
        sink = writer.tensors(
            "model", tensor_specs(tasks, how), max_shard_bytes=options.max_shard_bytes, metadata=METADATA
        )
        if client is None:
            output: ServerOutput | ClientOutput = ServerOutput(sink, how)
            kind, more = "server-model", 0
        else:
            schedule = options.schedule or "fresh"
            masks = ClientMasks(session.masks, client, options.round or 0, options.p2 or 0.0, schedule, session.rescale)
            output = ClientOutput(sink, how, masks.hidden, masks.factor)
            kind, more = "masked-model", sum(map(masks.hidden_elements, session.model.plan.tensors))
        digests = run(session.model, tasks, how, [output], base=session.base, progress=progress)
        sink.close()
        if client is None:
            copy_residual(session.model, writer, session.masks.hidden)
            copy_companions(session.model, writer)
        else:
            write_companions(writer, session, how)
        writer.add_bytes(
            MODEL_MANIFEST, manifest_bytes(model_manifest(session, kind, digests.model, digests.base, how))
        )
        session.save_key()
        path = writer.publish()
    total = sum(task.size for task in tasks)
    hidden = sum(map(session.masks.hidden_elements, session.model.plan.tensors)) + more
    groups = len(session.model.plan.groups())
    filled = session.base.counts() if session.base is not None else None
    return MaskResult(str(path), kind, digests.model, groups, hidden / total, session.new_key, filled)


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
    how = quantization(
        options.format, block_size=options.block_size, double_quant=options.double_quant, layout=options.layout
    )
    plan = options.plan_file
    model = open_model(str(source), overrides=load_overrides(plan) if plan is not None else None)
    if model.is_quantized:
        raise InputError("the model is quantized already", where=source)
    if model.kind == "masked-model":
        raise InputError("this model carries a client mask", where=source, hint="quantize the server model first")
    if plan is not None and model.kind == "server-model":
        raise InputError("a server model brings its own plan", where="--plan-file")
    model.plan.require_known()
    tasks = tensor_tasks(model, how, lambda tensor: None)
    with ArtifactWriter(Path(options.out), force=options.force, hashed=False) as writer:
        sink = writer.tensors(
            "model", tensor_specs(tasks, how), max_shard_bytes=options.max_shard_bytes, metadata=METADATA
        )
        digests = run(model, tasks, how, [ServerOutput(sink, how)], base=None, progress=progress)
        sink.close()
        copy_companions(model, writer, how)
        writer.add_bytes(MODEL_MANIFEST, manifest_bytes(_quantized_manifest(model, digests, how)))
        path = writer.publish()
    return QuantizeResult(str(path), how, clear_shares(model.plan.tensors, how))


def copy_companions(model: OpenModel, writer: ArtifactWriter, how: Quantization | None = None) -> None:
    """config.json (with the quantization of packed weights), tokenizer and generation files, as the owner has them."""
    config = model.checkpoint.config
    packed = how is not None and how.layout == "bnb"
    if config is not None and not packed and "quantization_config" not in config:
        writer.add_file("config.json", model.source.path / "config.json")
    elif config is not None:
        document = {key: value for key, value in config.items() if key != "quantization_config"}
        if how is not None and packed:
            skip = model.plan.skip_modules(config)
            document["quantization_config"] = quantization_config(
                how.format, how.block_size, how.double_quant, skip, model.config_dtype
            )
        writer.add_bytes("config.json", strictjson.pretty(document).encode())
    for companion in model.checkpoint.companions:
        writer.add_file(companion.name, companion)


def _quantized_manifest(model: OpenModel, digests: Digests, how: Quantization | None) -> ModelManifest:
    if model.manifest is not None and model.kind == "server-model":
        # The digest is over M_H ⊙ W. With the public base in the holes only the server model's own manifest knows it.
        digest = digests.model if model.manifest.fill == "zero" else model.manifest.model_digest
        changes = {"quantization": how, "source": source_record(model), "model_digest": digest}
        return model.manifest.model_copy(update=changes)
    return ModelManifest.model_validate(
        {
            "kind": "global-model",
            "job": None,
            "p1": 0.0,
            "axis": model.plan.axis,
            "rescale": False,
            "fill": "zero",
            "public_base": None,
            "plan": model.plan.digest,
            "overrides": model.plan.overrides,
            "model_digest": digests.model,
            "quantization": how,
            "groups": {},
            "tensors": {},
            "source": source_record(model),
        }
    )
