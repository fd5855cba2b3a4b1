"""What an export writes about itself: `fedqsn.json` of a model, `proxy.json` of a proxy, its line in the ledger.

The proxy id depends on nothing but key, model and options: the same export run again is the same release.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fedqsn_cli import strictjson
from fedqsn_cli.artifacts.ledger import Release
from fedqsn_cli.artifacts.manifests import (
    GroupCount,
    GroupUnits,
    ModelManifest,
    ProxyManifest,
    PublicBaseRecord,
    Quantization,
    SourceRecord,
    TrainsFill,
    merged_before,
    unit_table,
)
from fedqsn_cli.errors import InputError
from fedqsn_cli.export.pipeline import Digests
from fedqsn_cli.export.session import MaskingSession
from fedqsn_cli.masks.draw import LABEL, derive
from fedqsn_cli.masks.job_masks import ClientMasks
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.options.groups import USUAL_SHARD_BYTES


def masked_manifest(
    session: MaskingSession, kind: Literal["server-model", "masked-model"], digests: Digests
) -> ModelManifest:
    """`fedqsn.json` of a model that was masked."""
    job, plan = session.job, session.model.plan
    return ModelManifest.of(
        plan,
        session.model.source,
        kind=kind,
        job=job.commitment,
        p1=job.p1,
        rescale=session.rescale,
        fill=session.fill,
        public_base=public_base_record(session, digests.base),
        model_digest=digests.model,
        quantization=session.stored_quantization,
        groups={name: GroupCount(units=n, hidden=job.hides(name, n)) for name, n in plan.groups().items()},
        tensors=unit_table(plan.tensors),
        trained_fill=True if session.model.has_trained_fill else None,
        merged=tuple(sorted(merged_before(session.model.manifest, job.commitment))) or None,
    )


def quantized_manifest(model: OpenModel, digest: str, quantization: Quantization | None) -> ModelManifest:
    """`fedqsn.json` of a model that was quantized: the server model's own where there is one."""
    if model.manifest is None or model.kind != "server-model":
        return ModelManifest.of(model.plan, model.source, model_digest=digest, quantization=quantization)
    # The digest is over M_H ⊙ W. With the public base in the holes only the server model's own manifest knows it.
    known = digest if model.manifest.fill == "zero" else model.manifest.model_digest
    changes = {"quantization": quantization, "source": SourceRecord.of(model.source), "model_digest": known}
    return model.manifest.model_copy(update=changes)


def public_base_record(session: MaskingSession, digest: str | None) -> PublicBaseRecord | None:
    """The record of the public base: a hub reference with its commit, never a local path.

    Raises:
        InputError: it is not the one that the server model was filled with.
    """
    if session.base is None or digest is None:
        return None
    recorded = session.model.manifest.public_base if session.model.manifest else None
    if recorded is not None and recorded.sha256 != digest:
        raise InputError("not the public base that the server model was filled with", where="--public-base")
    source = session.base.source
    reference = f"{source.reference.split('@')[0]}@{source.revision}" if source.revision is not None else None
    return recorded or PublicBaseRecord(reference=reference, sha256=digest)


@dataclass(frozen=True, slots=True)
class ProxyRecord:
    """Everything that a proxy and its release say about how the proxy was made.

    Args:
        digests: of the model and the public base that went into it.
        train: what clients train besides visible units. max_shard_bytes: largest sum of tensor bytes in one file.
    """

    session: MaskingSession
    quantization: Quantization | None
    train: TrainsFill
    max_shard_bytes: int
    digests: Digests

    def manifest(self, masks: ClientMasks, files: Mapping[str, str]) -> ProxyManifest:
        """`proxy.json` for one client.

        Args:
            files: SHA-256 of every other file of the proxy.
        """
        plan = self.session.model.plan
        base = public_base_record(self.session, self.digests.base)
        return ProxyManifest(
            proxy_id=self._proxy_id(masks, base),
            job=self.session.job.commitment,
            round=masks.round,
            quantization=self.quantization,
            fill=self.session.fill,
            public_base=base,
            rescale=self.session.rescale,
            groups={name: GroupUnits(units=n) for name, n in plan.groups().items()},
            tensors=unit_table(plan.tensors),
            train=self.train,
            files=dict(files),
        )

    def release(self, masks: ClientMasks, proxy_id: str, sha256: str) -> Release:
        """The ledger line of a proxy, whose proxy.json has this digest."""
        session = self.session
        return Release(
            client=masks.client,
            round=masks.round,
            schedule=masks.schedule,
            proxy_id=proxy_id,
            proxy_sha256=sha256,
            p1=session.job.p1,
            p1_least=session.job.least_ratio,
            p2=masks.p2,
            rescale=session.rescale,
            fill=session.fill,
            train=self.train,
            max_shard_bytes=None if self.max_shard_bytes == USUAL_SHARD_BYTES else self.max_shard_bytes,
            quantization=self.quantization,
            plan=session.model.plan.digest,
            model_digest=self.digests.model,
            job=session.job.commitment,
        )

    def _proxy_id(self, masks: ClientMasks, base: PublicBaseRecord | None) -> str:
        """HMAC(key, scope, model digest, options): unpredictable without the key, equal when an export is repeated."""
        options: dict[str, Any] = {
            "p2": masks.p2,
            "schedule": masks.schedule,
            "rescale": self.session.rescale,
            "fill": self.session.fill,
            "public_base": base.sha256 if base else None,
            "quantization": self.quantization.model_dump() if self.quantization else None,
            "plan": self.session.model.plan.digest,
        }
        if self.train is not None:
            options["train"] = self.train
        fields = (LABEL, "proxy", masks.client, str(masks.round), self.digests.model, strictjson.dumps(options))
        return derive(self.session.job.key, fields).hex()
