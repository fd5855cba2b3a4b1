"""What the owner sends to each client, and what counts as its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedqsn_cli.artifacts.ledger import Release
from fedqsn_cli.artifacts.manifests import (
    PROXY_MANIFEST,
    ProxyManifest,
    UpdateManifest,
    file_digest,
    read_manifest,
)
from fedqsn_cli.courier.layout import Owner
from fedqsn_cli.courier.recipe import Recipe
from fedqsn_cli.crypto.keys import SigningKey
from fedqsn_cli.crypto.seal import seal, unseal
from fedqsn_cli.errors import FedqsnError, InputError, RefusedUpdate
from fedqsn_cli.options import SealOptions, UnsealOptions


class Unreachable(Exception):
    """The server does not answer now."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One client's proxy, and where its update is to be.

    Args:
        folder: the proxy. public: the client's public key. update: the folder of the answer.
        carried: what the sealed files are called.
        recipe: signed.
    """

    client: str
    folder: Path
    proxy_sha256: str
    public: Path
    update: Path
    carried: Path
    recipe: str

    @property
    def sealed_proxy(self) -> Path:
        """What the courier carries to the client."""
        return self.carried.with_suffix(".proxy")

    @property
    def sealed_update(self) -> Path:
        """What it carries back."""
        return self.carried.with_suffix(".update")

    @property
    def done(self) -> bool:
        """Whether there is an answer that was taken."""
        return self.update.exists()

    def prepare(self) -> None:
        """Seal the proxy for its client; sealed once, so that an interrupted transfer goes on."""
        if not self.sealed_proxy.exists():
            seal(self.folder, SealOptions(out=self.sealed_proxy, to=self.public))

    def take(self, key: Path) -> None:
        """Open the answer; what the courier carried is removed, whatever it is.

        Raises:
            RefusedUpdate: the client did not seal and sign it, or it answers something else.
        """
        try:
            self._open(key)
        except FedqsnError as error:
            raise RefusedUpdate(f"the answer of client {self.client!r} is refused: {error.what}") from None
        finally:
            self.sealed_update.unlink()

    def _open(self, key: Path) -> None:
        opened = self.carried.with_suffix(".opened")
        unseal(self.sealed_update, UnsealOptions(out=opened, key=key, verify_key=self.public, force=True))
        told = read_manifest(opened, UpdateManifest)
        if told.proxy_sha256 != self.proxy_sha256:
            raise RefusedUpdate("it is the update of another proxy", where=opened)
        self.update.parent.mkdir(parents=True, exist_ok=True)
        opened.rename(self.update)


def deliveries(
    owner: Owner, folders: Sequence[Path], inbox: Path, releases: Sequence[Release], recipe: Recipe, key: SigningKey
) -> list[Delivery]:
    """What is to be sent to whom: the ledger says it, whatever the folders are called.

    Raises:
        InputError: a proxy is not in the ledger, two are for one client, or a client has not joined.
    """
    known = {release.proxy_id: release for release in releases}
    made = [_delivery(owner, folder, inbox, known, recipe, key) for folder in folders]
    clients = [delivery.client for delivery in made]
    doubled = next((client for client in clients if clients.count(client) > 1), None)
    if doubled is not None:
        raise InputError(f"two proxies are for client {doubled!r}", where="PROXY", hint="send one round at a time")
    return made


def _delivery(
    owner: Owner, folder: Path, inbox: Path, known: Mapping[str, Release], recipe: Recipe, key: SigningKey
) -> Delivery:
    manifest, digest = read_manifest(folder, ProxyManifest), file_digest(folder / PROXY_MANIFEST)
    release = known.get(manifest.proxy_id)
    if release is None or release.proxy_sha256 != digest:
        raise InputError("is no proxy of this ledger", where=folder, hint="export it with --ledger")
    client = release.client
    carried = owner.carried / manifest.proxy_id[:32]
    public = owner.public_key(client)
    return Delivery(client, folder, digest, public, inbox / client, carried, recipe.signed(digest, key))
