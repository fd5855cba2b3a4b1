"""What merge and restore share: a model that belongs to the job of a key, and the files of the model that they make."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedqsn_cli.artifacts.manifests import (
    MODEL_MANIFEST,
    ModelManifest,
    SourceRecord,
    manifest_bytes,
    merged_before,
    short_id,
)
from fedqsn_cli.checkpoint import ArtifactWriter, TensorSink
from fedqsn_cli.errors import InputError, KeyFileError
from fedqsn_cli.export.companions import copy_companions
from fedqsn_cli.export.outputs import tensor_specs
from fedqsn_cli.masks import job_key
from fedqsn_cli.masks.job_key import JobKey
from fedqsn_cli.models.model import OpenModel, open_model
from fedqsn_cli.models.residual import residual_sink
from fedqsn_cli.models.tensor_task import TensorTask


def open_job_model(source: str | Path, key: str | Path) -> tuple[JobKey, OpenModel]:
    """Open a dense model that belongs to the job of a key.

    Raises:
        InputError: it is quantized, carries a client mask, or belongs to another job.
    """
    job = job_key.load(key)
    model = open_model(str(source), axis=job.axis, overrides=job.overrides)
    if model.is_quantized or model.kind == "masked-model":
        problem = "this model is quantized or has a client mask"
        raise InputError(problem, where=source, hint="give the global or server model")
    if model.plan.digest != job.plan_digest:
        raise KeyFileError("the key belongs to a job with another plan than this model's", where=key)
    if model.kind == "server-model" and model.manifest and model.manifest.job != job.commitment:
        raise KeyFileError("the key belongs to another job than this server model", where=key)
    return job, model


@contextmanager
def model_sinks(
    writer: ArtifactWriter, model: OpenModel, tasks: Sequence[TensorTask], max_shard_bytes: int, *, with_residual: bool
) -> Iterator[tuple[TensorSink, TensorSink | None]]:
    """The sink for the weights of a merged or restored model, and that for its residual; both end with the block.

    Args:
        model: whose tensors, and metadata of files, the new one has. tasks: its tensors, in the order of writing.
        with_residual: whether a residual is written at all; a model without 16-bit floats has none.
    """
    weights = writer.tensors(
        "model", tensor_specs(tasks, None), max_shard_bytes=max_shard_bytes, metadata=model.checkpoint.metadata
    )
    residual = residual_sink(writer, model.plan.tensors) if with_residual else None
    yield weights, residual
    weights.close()
    if residual is not None:
        residual.close()


def publish(writer: ArtifactWriter, model: OpenModel, manifest: ModelManifest) -> str:
    """Add the companions of `model` and `fedqsn.json`, and give the new model its path, which is returned."""
    copy_companions(model, writer)
    writer.add_bytes(MODEL_MANIFEST, manifest_bytes(manifest))
    return str(writer.publish())


def merged_manifest(
    model: OpenModel, job: JobKey, digest: str | None = None, *, added: Iterable[str] = (), **facts: object
) -> ModelManifest:
    """`fedqsn.json` of what a model is merged or restored to; a server model stays one.

    Args:
        digest: of the new server model. added: the proxies whose updates are in it now, too, by their ids.
        facts: other fields that differ.
    """
    merged = {*merged_before(model.manifest, job.commitment), *map(short_id, added)}
    facts["merged"] = tuple(sorted(merged)) or None
    if model.manifest is None or model.kind != "server-model":
        return ModelManifest.of(model.plan, model.source, job=job.commitment, p1=job.p1, **facts)
    return model.manifest.model_copy(
        update={"model_digest": digest, "source": SourceRecord.of(model.source), "server_state": None, **facts}
    )
