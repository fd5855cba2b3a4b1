"""Which updates and partial sums belong to the round: released by the ledger of this job, for this model, each once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedqsn_cli.artifacts import ledger as ledgers
from fedqsn_cli.artifacts.ledger import Release
from fedqsn_cli.artifacts.manifests import (
    ADAPTER_TENSORS,
    UPDATE_MANIFEST,
    UPDATE_TENSORS,
    UpdateManifest,
    merged_before,
    read_manifest,
    short_id,
)
from fedqsn_cli.artifacts.update_folder import files_of, format_of, most_header_bytes, require_no_more, update_shape
from fedqsn_cli.checkpoint import read_header
from fedqsn_cli.checkpoint.header import FileIdentity
from fedqsn_cli.crypto.optional import verify_signed
from fedqsn_cli.dtypes import WEIGHT_DTYPES
from fedqsn_cli.errors import RefusedUpdate, SignatureError
from fedqsn_cli.kernels.digests import algorithm_of
from fedqsn_cli.masks.job_key import JobKey
from fedqsn_cli.masks.job_masks import ClientMasks, ServerMasks
from fedqsn_cli.merging.updates.adapters import AdapterFolder, KeptFactors
from fedqsn_cli.merging.updates.partial_sum import PartialSum, is_partial
from fedqsn_cli.merging.updates.read_update import ClientUpdate
from fedqsn_cli.merging.updates.refusals import Refusals
from fedqsn_cli.merging.updates.stored_values import StoredValues, TensorValues
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.planning.tensor_plan import TensorPlan

Sent = ClientUpdate | PartialSum

_COMPARED = {UPDATE_TENSORS, ADAPTER_TENSORS}  # with their digests in update.json, while they are merged


def is_late(each: Sent) -> bool:
    """Whether it answers a proxy of an earlier model, and is merged all the same."""
    return isinstance(each, ClientUpdate) and each.late > 0


@dataclass(frozen=True, slots=True)
class Round:
    """What is merged: updates, in the order of client ids, and partial sums."""

    updates: tuple[ClientUpdate, ...]
    partials: tuple[PartialSum, ...]

    @classmethod
    def of(cls, sent: Sequence[Sent]) -> Round:
        """Tell the two kinds apart."""
        return cls(
            tuple(each for each in sent if isinstance(each, ClientUpdate)),
            tuple(each for each in sent if isinstance(each, PartialSum)),
        )

    def __iter__(self) -> Iterator[Sent]:
        return iter((*self.updates, *self.partials))

    @property
    def clients(self) -> int:
        """How many updates there are, those in partial sums included."""
        return sum(len(each.claims) for each in self)

    @property
    def examples(self) -> int:
        """Σ n_k."""
        return sum(each.examples for each in self)

    @property
    def model_digest(self) -> str:
        """Content digest of the model that all of them are for, but those that are late."""
        return next(each for each in self if not is_late(each)).model_digest

    @property
    def moves_fill(self) -> bool:
        """Whether a client trained the fill of hidden units, too."""
        return any(each.moves_fill for each in self)


class UpdateVerifier:
    """Accepts updates of one job, released by its ledger, for one model.

    Args:
        job: the job's key. model: what the updates are merged into. ledger: the record of all releases.
        key_of: the public key that the update of a client must be signed with; None where it need not be signed.
        takes_late: whether updates of earlier rounds are taken, too.
    """

    def __init__(
        self,
        job: JobKey,
        model: OpenModel,
        ledger: Path,
        key_of: Callable[[str], Path | None] = lambda client: None,
        *,
        takes_late: bool = False,
    ) -> None:
        self.masks = ServerMasks(job)
        self._model = model
        self._ledger = ledger
        self._key_of = key_of
        self._takes_late = takes_late
        self._factors = KeptFactors()
        self._merged = merged_before(model.manifest, job.commitment)
        self._releases = {release.proxy_id: release for release in ledgers.read(ledger, job)}

    def round(self, folders: Sequence[str | Path], refusals: Refusals) -> Round:
        """Open all updates and partial sums, in the order of client ids: the order of arguments changes nothing.

        Raises:
            RefusedUpdate: one is foreign, stale, duplicate or malformed, or they are of different models, and that is
                not only noted in `refusals`.
        """
        opened: list[Sent] = []
        for folder in folders:
            with refusals.noting(folder):
                opened.append(self._open_partial(Path(folder)) if is_partial(folder) else self._open(Path(folder)))
        opened.sort(key=lambda each: each.client)
        newest = max(opened, key=lambda each: each.round, default=None) if self._takes_late else None
        if newest is not None:
            opened = self._new([_aged(each, newest) for each in opened], refusals)
        last = {client: each for each in opened for client, _ in each.claims}
        sent = Counter(client for each in opened for client, _ in each.claims)
        for each in opened:
            with refusals.noting(each.folder, each.client if isinstance(each, ClientUpdate) else None):
                twice = next((client for client, _ in each.claims if sent[client] > 1), None)
                if twice is not None:
                    raise RefusedUpdate(f"client {twice!r} sent more than one update", where=last[twice].folder)
                if not refusals.skip:  # otherwise the model itself tells which of them are stale
                    self._check_model(each, newest or opened[0])
                self._check_fill(each)
        return Round.of(refusals.without(opened))

    def _check_model(self, each: Sent, first: Sent) -> None:
        if each.model_digest != first.model_digest and not is_late(each):
            raise RefusedUpdate(
                f"it was trained on another model than the update in {first.folder}",
                where=each.folder,
                hint="merge the updates of one round only",
            )

    def _new(self, opened: Sequence[Sent], refusals: Refusals) -> list[Sent]:
        """Those whose proxies have no update in the model yet. Raises RefusedUpdate as `round`."""
        for each in opened:
            if is_late(each) and isinstance(each, ClientUpdate) and short_id(each.manifest.proxy_id) in self._merged:
                with refusals.noting(each.folder, each.client):
                    what = f"an update of client {each.client!r} for round {each.round} is in this model already"
                    raise RefusedUpdate(what, where=each.folder, hint="a proxy has one update, which is merged once")
        return list(refusals.without(opened))

    def _check_fill(self, each: Sent) -> None:
        if each.moves_fill and self._model.kind != "server-model":
            raise RefusedUpdate(
                "its client trained the public base in the holes, too, and a global model has no holes",
                where=each.folder,
                hint="merge it into the server model; a --restore puts all together",
            )

    def control(self, folder: str | Path, others: Round) -> ClientUpdate:
        """Open the control update: verified like any other, of a client whose update is not merged.

        Raises:
            RefusedUpdate: it is refused like any other, is of a client that sent an update, or of another model.
        """
        control = self._open(Path(folder))
        self._check_fill(control)
        if any(control.client == client for other in others for client, _ in other.claims):
            raise RefusedUpdate(
                f"client {control.client!r} sent an update too", where=folder, hint="a control is not merged"
            )
        if control.model_digest != others.model_digest:
            first = next(iter(others)).folder
            raise RefusedUpdate(
                f"the control was trained on another model than the update in {first}",
                where=folder,
                hint="train it on a proxy of the same round",
            )
        return control

    def _open_partial(self, folder: Path) -> PartialSum:
        found = PartialSum.open(folder, self.masks.job, self._model, self._releases)
        for client, _ in found.claims:
            if self._key_of(client) is not None and not found.manifest.signed:
                hint = "give --verify-key when the partial sum is made, too"
                raise RefusedUpdate("nobody checked the signatures of the updates in it", where=folder, hint=hint)
        return found

    def _open(self, folder: Path) -> ClientUpdate:
        manifest = read_manifest(folder, UpdateManifest)
        release = self._releases.get(manifest.proxy_id)
        if release is None:
            raise RefusedUpdate(f"its proxy {manifest.proxy_id[:12]} is not in the ledger {self._ledger}", where=folder)
        if release.proxy_sha256 != manifest.proxy_sha256:
            raise RefusedUpdate("it was trained on another proxy.json than the one released", where=folder)
        if release.job != self.masks.job.commitment or release.plan != self._model.plan.digest:
            raise RefusedUpdate("it belongs to another job or plan", where=folder, hint="check --key")
        if manifest.files.keys() != files_of(manifest):
            names = ", ".join(sorted(files_of(manifest)))
            raise RefusedUpdate(f"it must list exactly {names}", where=folder / UPDATE_MANIFEST)
        require_no_more(folder, manifest)
        self._check_signature(folder, manifest, release.client)
        client = ClientMasks(self.masks, release.client, release.round, release.p2, release.schedule, release.rescale)
        stored, identities = self._values(folder, manifest, client, release)
        return ClientUpdate(folder, manifest, release, client, identities, stored)

    def _values(
        self, folder: Path, manifest: UpdateManifest, client: ClientMasks, release: Release
    ) -> tuple[dict[str, TensorValues], dict[str, FileIdentity]]:
        """The U of each float tensor, and the files that it is in. Raises RefusedUpdate."""
        most = most_header_bytes(self._model.plan.tensors)
        header = read_header(folder / UPDATE_TENSORS, most) if UPDATE_TENSORS in manifest.files else None
        entries, identities = ({}, {}) if header is None else (header.entries, {UPDATE_TENSORS: header.identity})
        adapters = AdapterFolder(folder, manifest, most, self._factors) if manifest.adapters is not None else None
        stored: dict[str, TensorValues] = {}
        for tensor in self._model.plan.tensors:
            if tensor.dtype in WEIGHT_DTYPES:
                axis = None if release.train is not None else tensor.axis
                values: TensorValues | None = adapters.take(tensor, axis) if adapters is not None else None
                if values is None:
                    shape, kind = _expected_shape(tensor, client, release), format_of(manifest.precision, tensor.shape)
                    values = StoredValues.take(entries, tensor.name, kind, shape, folder)
                stored[tensor.name] = values
        if entries:
            raise RefusedUpdate("the model has no such tensor", where=f"{folder}: {next(iter(entries))}")
        if adapters is not None:
            adapters.finish()
            identities[ADAPTER_TENSORS] = adapters.identity
        return stored, identities

    def _check_signature(self, folder: Path, manifest: UpdateManifest, client: str) -> None:
        """Is it the client who got the proxy that sends the update? Raises RefusedUpdate."""
        public = self._key_of(client)
        if public is None:
            return
        listed = {name: manifest.files[name] for name in _COMPARED & manifest.files.keys()}
        known = {name: digest for name, digest in listed.items() if algorithm_of(digest) == "sha256"}
        try:
            verify_signed(folder, public, known)
        except SignatureError as error:
            hint = f"its proxy is that of client {client!r}, who must sign with the key of {public}"
            raise RefusedUpdate(error.what, where=error.where, hint=hint) from None


def _aged(each: Sent, newest: Sent) -> Sent:
    """An update with the number of rounds that it is late, where it was trained on an earlier model than the newest."""
    if not isinstance(each, ClientUpdate) or each.model_digest == newest.model_digest:
        return each
    return replace(each, late=max(0, newest.round - each.round))


def _expected_shape(tensor: TensorPlan, client: ClientMasks, release: Release) -> tuple[int, ...]:
    """The shape of U that the release calls for."""
    if release.train is not None:
        return tensor.shape
    return update_shape(tensor.shape, tensor.axis, tensor.view, tensor.view[0] * client.visible_count(tensor))
