"""A model that belongs to the job of a key, and its manifest."""

from __future__ import annotations

from pathlib import Path

from fedqsn_cli.artifacts.manifests import ModelManifest, SourceRecord
from fedqsn_cli.errors import InputError, KeyFileError
from fedqsn_cli.masks import job_key
from fedqsn_cli.masks.job_key import JobKey
from fedqsn_cli.models.model import OpenModel, open_model


def open_job_model(source: str, key: str | Path) -> tuple[JobKey, OpenModel]:
    """Open a dense model that belongs to the job of a key.

    Raises:
        InputError: it is quantized, carries a client mask, or belongs to another job.
    """
    job = job_key.load(key)
    model = open_model(source, axis=job.axis, overrides=job.overrides)
    if model.is_quantized or model.kind == "masked-model":
        raise InputError("this model is on its way to a proxy", where=source, hint="give the global or server model")
    if model.plan.digest != job.plan_digest:
        raise KeyFileError("the key belongs to a job with another plan than this model's", where=key)
    if model.kind == "server-model" and model.manifest and model.manifest.job != job.commitment:
        raise KeyFileError("the key belongs to another job than this server model", where=key)
    return job, model


def merged_manifest(model: OpenModel, job: JobKey, digest: str | None, kind: str | None = None) -> ModelManifest:
    """`fedqsn.json` of a merged or restored model."""
    if model.manifest is not None and model.kind == "server-model" and kind is None:
        return model.manifest.model_copy(update={"model_digest": digest, "source": SourceRecord.of(model.source)})
    return ModelManifest.of(model.plan, model.source, job=job.commitment, p1=job.p1)
