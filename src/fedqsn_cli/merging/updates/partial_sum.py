"""A partial sum that is merged on: checked like the updates in it, then read once.

It is made with the job's key, which seals it, by `partial_pass`. What it says of its clients is held against the ledger
and the limits of this merge once more; its numbers must be such as updates of these norms can add up to.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from fedqsn_cli.artifacts.ledger import Release
from fedqsn_cli.artifacts.manifests import read_manifest
from fedqsn_cli.artifacts.partial_folder import (
    PARTIAL_MANIFEST,
    PARTIAL_TENSORS,
    SUM,
    WEIGHTS,
    PartialManifest,
    SummedClient,
    partial_specs,
    unit_run,
)
from fedqsn_cli.artifacts.update_folder import most_header_bytes
from fedqsn_cli.checkpoint import read_header
from fedqsn_cli.checkpoint.header import FileIdentity
from fedqsn_cli.dtypes import WEIGHT_DTYPES
from fedqsn_cli.errors import InputError, RefusedUpdate
from fedqsn_cli.kernels.digests import algorithm_of
from fedqsn_cli.kernels.hash_threads import HashQueue
from fedqsn_cli.masks.job_key import JobKey
from fedqsn_cli.merging.sums.exact_sum import Digits, Doubles
from fedqsn_cli.merging.updates.file_hash import FileHash
from fedqsn_cli.merging.updates.stored_values import StoredPiece
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.models.tensor_task import TensorTask


def is_partial(folder: str | Path) -> bool:
    """Whether a folder says that it holds a partial sum."""
    return os.path.lexists(Path(folder) / PARTIAL_MANIFEST)


@dataclass(frozen=True, slots=True)
class PartialSum:
    """A partial sum that passed all checks of names, shapes and origin; its values are checked as they are read.

    Args:
        releases: of its clients' proxies, in the order of the manifest. starts: absolute offsets of its tensors.
    """

    folder: Path
    manifest: PartialManifest
    releases: tuple[Release, ...]
    identity: FileIdentity
    starts: Mapping[str, int]

    @classmethod
    def open(cls, folder: Path, job: JobKey, model: OpenModel, releases: Mapping[str, Release]) -> PartialSum:
        """Open a partial sum of this job.

        Args:
            releases: of the ledger, by proxy id.

        Raises:
            RefusedUpdate: it was not made with the job's key, is for another model, or contradicts the ledger or
                itself.
        """
        manifest = read_manifest(folder, PartialManifest)
        if manifest != manifest.sealed(job):
            hint = "it was changed, or made with another key than this job's"
            raise RefusedUpdate("its seal is wrong", where=folder / PARTIAL_MANIFEST, hint=hint)
        if manifest.job != job.commitment or manifest.plan != model.plan.digest:
            raise RefusedUpdate("it belongs to another job or plan", where=folder, hint="check --key")
        if manifest.files.keys() != {PARTIAL_TENSORS}:
            raise RefusedUpdate(f"it must list exactly {PARTIAL_TENSORS}", where=folder / PARTIAL_MANIFEST)
        known = tuple(_release(client, manifest, releases, folder) for client in manifest.clients)
        tensors = [tensor for tensor in model.plan.tensors if tensor.dtype in WEIGHT_DTYPES]
        header = read_header(folder / PARTIAL_TENSORS, most_header_bytes(tensors))
        specs = {spec.name: (spec.dtype, spec.shape) for spec in partial_specs(tensors)}
        if specs != {name: (entry.dtype, entry.shape) for name, entry in header.entries.items()}:
            raise RefusedUpdate("its tensors are not those of a sum for this model", where=folder / PARTIAL_TENSORS)
        starts = {name: entry.start for name, entry in header.entries.items()}
        return cls(folder, manifest, known, header.identity, starts)

    @property
    def claims(self) -> tuple[tuple[str, int], ...]:
        """Whose examples are in it, and how many."""
        return tuple((client.client, client.num_examples) for client in self.manifest.clients)

    @property
    def client(self) -> str:
        """The first of its clients."""
        return self.manifest.clients[0].client

    @property
    def examples(self) -> int:
        """Σ n_k."""
        return sum(count for _, count in self.claims)

    @property
    def most(self) -> float:
        """Σ n_k ‖Δ_k‖, after clipping: no number in the sum is larger."""
        return math.fsum(client.num_examples * client.factor * client.norm for client in self.manifest.clients)

    @property
    def round(self) -> int:
        """The latest round that one of its updates answers."""
        return max(release.round for release in self.releases)

    @property
    def model_digest(self) -> str:
        """Content digest of the model that it is for."""
        return self.manifest.model_digest

    @property
    def moves_fill(self) -> bool:
        """Whether one of its clients trained the fill of hidden units, too."""
        return any(release.train == "all" for release in self.releases)


def _release(client: SummedClient, manifest: PartialManifest, releases: Mapping[str, Release], folder: Path) -> Release:
    """The ledger's line about the proxy of a client. Raises RefusedUpdate."""
    release = releases.get(client.proxy_id)
    if release is None or release.client != client.client:
        what = f"the ledger has no proxy {client.proxy_id[:12]} of client {client.client!r}"
        raise RefusedUpdate(what, where=folder)
    if release.model_digest != manifest.model_digest:
        raise RefusedUpdate(f"the proxy of client {client.client!r} was made of another model", where=folder)
    return release


@dataclass(frozen=True, slots=True)
class PartialChunk:
    """What a partial sum has of a chunk of the model.

    Args:
        digits: of Σ n_k Δ_k [rows, cols]. weights: Σ n_k of each of the units.
    """

    digits: Digits
    weights: Doubles
    read: StoredPiece


class PartialReader:
    """Reads the numbers of a partial sum once, in the order in which a pass goes through the model.

    Args:
        queue: where the digest of its file is computed.
    """

    def __init__(self, partial_sum: PartialSum, queue: HashQueue) -> None:
        self.sum = partial_sum
        self._most = partial_sum.most
        algorithm = algorithm_of(partial_sum.manifest.files[PARTIAL_TENSORS])
        self._hash = FileHash(partial_sum.folder / PARTIAL_TENSORS, partial_sum.identity, queue, algorithm)

    def prepare(self, task: TensorTask, first: int, rows: int) -> Callable[[], PartialChunk | InputError]:
        """A call that reads what belongs to rows `first` .. `first + rows` of a tensor; from any thread."""
        return partial(self._chunk, task, first, rows)

    def _chunk(self, task: TensorTask, first: int, rows: int) -> PartialChunk | InputError:
        cols, starts = task.plan.view[2], self.sum.starts
        start, run = starts[task.name + SUM] + 16 * cols * first, unit_run(task.plan.axis, task.plan.view, first, rows)
        try:
            data = self._hash.read(start, 16 * cols * rows)
            weights = self._hash.read(starts[task.name + WEIGHTS] + 8 * run.first, 8 * run.count).view(np.int64)
        except InputError as error:
            return error
        high_and_low = data.view(np.int64).reshape(rows, 2, cols)
        digits = Digits(high_and_low[:, 0], high_and_low[:, 1])
        if not digits.could_be_of(len(self.sum.releases), self._most):
            what = f"is not a sum of {len(self.sum.releases)} updates with the norms in {PARTIAL_MANIFEST}"
            return RefusedUpdate(what, where=self._where(task, SUM))
        if weights.size and not 0 <= weights.min() <= weights.max() <= self.sum.examples:
            what = f"counts more than its clients' {self.sum.examples} examples, or fewer than none"
            return RefusedUpdate(what, where=self._where(task, WEIGHTS))
        return PartialChunk(digits, weights.astype(np.float64), StoredPiece(PARTIAL_TENSORS, start, data))

    def _where(self, task: TensorTask, kind: str) -> str:
        return f"{self.sum.folder}: {task.name}{kind}"

    def take(self, found: PartialChunk | InputError) -> PartialChunk:
        """Hash what was read; call it in the order of the pass. Raises what was wrong with it."""
        if isinstance(found, InputError):
            raise found
        self._hash.take(found.read.start, found.read.data)
        return found

    def finish(self) -> None:
        """Check the digest of the whole file. Raises RefusedUpdate."""
        if self._hash.recorded() != self.sum.manifest.files[PARTIAL_TENSORS]:
            where = self.sum.folder / PARTIAL_TENSORS
            raise RefusedUpdate(f"its digest is not the one in {PARTIAL_MANIFEST}", where=where, hint="make it again")
