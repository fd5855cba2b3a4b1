"""`merge --partial`: from updates, and partial sums of others, to one partial sum of all of them.

Sums are exact, and a merge rounds once, at its end. So updates may be added up in any groups and any number of steps,
and the model is the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from fedqsn_cli.artifacts.manifests import manifest_bytes
from fedqsn_cli.artifacts.partial_folder import (
    PARTIAL_MANIFEST,
    PARTIAL_TENSORS,
    PartialManifest,
    SummedClient,
    partial_specs,
)
from fedqsn_cli.checkpoint import ArtifactWriter
from fedqsn_cli.kernels.hash_threads import HashThreads
from fedqsn_cli.merging.job_model import open_job_model
from fedqsn_cli.merging.merged_clients import clients_of
from fedqsn_cli.merging.partial_pass import PartialPass
from fedqsn_cli.merging.results import MergedClient, MergeResult
from fedqsn_cli.merging.rules.aggregation import Aggregation, aggregation
from fedqsn_cli.merging.rules.survey import admit, check_read
from fedqsn_cli.merging.updates.refusals import Refusals
from fedqsn_cli.merging.updates.verify import Round, UpdateVerifier
from fedqsn_cli.models.tensor_task import tensor_tasks
from fedqsn_cli.options import MergeOptions
from fedqsn_cli.progress import Progress


def add_up(
    source: str | Path, folders: Sequence[str | Path], options: MergeOptions, *, progress: Progress
) -> MergeResult:
    """Add up updates of a round and write their sum.

    Args:
        source: the model that the proxies were made of. folders: of updates and partial sums.

    Raises:
        RefusedUpdate, InputError: as `merge`.
    """
    assert not isinstance(options.clip_norm, str)
    job, model = open_job_model(source, options.key)
    with ArtifactWriter(Path(options.out), force=options.force, replaces=[PARTIAL_MANIFEST], digest="blake3") as writer:
        verifier = UpdateVerifier(job, model, options.required_ledger(), options.verify_key_of)
        tasks = tensor_tasks(model, None, verifier.masks.hidden_on_the_way)
        refusals = Refusals(options.on_refused == "skip", [])
        found, survey = admit(verifier, folders, model, tasks, refusals, options, progress)
        how = aggregation(options, found, survey, None)
        floats = [task.plan for task in tasks if task.tensor.is_float]
        stem = PARTIAL_TENSORS.removesuffix(".safetensors")
        sink = writer.tensors(stem, list(partial_specs(floats)), max_shard_bytes=None, metadata={})
        with HashThreads() as hashing:
            summed = PartialPass(model, tasks, found, how, hashing)
            summed.write(sink, progress)
            check_read(summed.clients, summed.partials, summed.digest(), summed.sizes, model, options)
        sink.close()
        clients = clients_of(summed.clients, summed.partials, summed.sizes, summed.size, how)
        manifest = PartialManifest(
            job=job.commitment,
            plan=model.plan.digest,
            model_digest=found.model_digest,
            clip_norm=options.clip_norm,
            signed=options.verify_key is not None,
            clients=tuple(_summed_clients(found, clients, how)),
            files=writer.digests,
        )
        writer.add_bytes(PARTIAL_MANIFEST, manifest_bytes(manifest.sealed(job)))
        path = str(writer.publish())
    return MergeResult(
        path=path,
        kind="partial-sum",
        clients=clients,
        num_examples=found.examples,
        covered=summed.covered / summed.size,
        model_digest=None,
        refused=tuple(refusals.refused),
    )


def _summed_clients(found: Round, clients: Sequence[MergedClient], how: Aggregation) -> Iterator[SummedClient]:
    """What the sum's manifest says about each client.

    Args:
        clients: what was measured of them, those of `found.updates` first.
    """
    for update, told, factor in zip(found.updates, clients, how.factors, strict=False):
        yield SummedClient(
            client=update.client,
            proxy_id=update.release.proxy_id,
            num_examples=update.examples,
            factor=factor,
            norm=told.norm,
            relative_norm=told.relative_norm,
            coverage=told.coverage,
            largest_tensor=told.largest_tensor.record,
            largest_unit=told.largest_unit.record,
            first_loss=told.first_loss,
            last_loss=told.last_loss,
        )
    for each in found.partials:
        yield from each.manifest.clients
