"""An outbox: the sealed proxies of a round, what the owner orders of each client, and the verdict of the audit.

    CLIENT.proxy        sealed for the client
    CLIENT.order        signed by the owner
    audit.intoto.json   the attestation

`courier-pack` makes it where the owner's keys are; it holds nothing that the courier's host may not see, and the host
checks it with the owner's public key alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedqsn_cli import validate
from fedqsn_cli.artifacts import ledger as ledgers
from fedqsn_cli.artifacts.ledger import Release
from fedqsn_cli.artifacts.manifests import PROXY_MANIFEST, ProxyManifest, read_manifest
from fedqsn_cli.checkpoint.files import (
    make_staging_directory,
    read_file,
    remove_tree,
    rename_exclusive,
    stream_new_file,
    write_file_atomically,
)
from fedqsn_cli.courier.layout import Owner
from fedqsn_cli.courier.orders import Order
from fedqsn_cli.courier.parts import PartDigests, Parts
from fedqsn_cli.crypto import dsse
from fedqsn_cli.crypto.attestation import Attestation, folder_digest, read_passed
from fedqsn_cli.crypto.keys import SigningKey, VerifyKey, load_recipient, load_signing_key
from fedqsn_cli.crypto.seal import sealed_pieces
from fedqsn_cli.errors import FormatError, InputError, OutputExists
from fedqsn_cli.options import CourierPackOptions, ProposalOptions

ATTESTATION = "audit.intoto.json"


@dataclass(frozen=True, slots=True)
class Packed:
    """The result of `courier_pack`.

    Args:
        path: the outbox. clients: for whom there is a proxy in it. bytes: of all sealed proxies.
    """

    path: str
    clients: tuple[str, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class Consignment:
    """What goes to one client: an order, and the sealed proxy that it describes."""

    order: Order
    text: str
    sealed: Path

    @property
    def name(self) -> str:
        """What its job and its files on the host are called."""
        return self.order.proxy_sha256[:32]


def courier_pack(path: str | Path, proxies: Sequence[str | Path], options: CourierPackOptions) -> Packed:
    """Seal audited proxies for their clients, and sign what the clients are asked to train.

    Args:
        path: the owner's folder. proxies: of one round.
        options: see `CourierPackOptions`.

    Raises:
        InputError: a proxy is not in the ledger, two are for one client, or a client has not joined.
        SignatureError: a proxy is not what was audited. GateFailed: the audit did not pass.
        OutputExists: there is something at `out`.

    Example:
        >>> courier_pack("courier", ["proxies/alice"], "outbox", key="owner.key", ledger="ledger.jsonl",
        ...              attestation="audit.intoto.json").clients
    """
    owner, key, out = Owner.open(path), load_signing_key(options.key), Path(options.out)
    attestation = Path(options.attestation)
    audited = read_passed(attestation, key.public_key(), options.policy)
    folders = [
        Path(validate.here(proxy, "PROXY")) for proxy in ([proxies] if isinstance(proxies, str | Path) else proxies)
    ]
    sealing = _sealings(owner, folders, ledgers.read(Path(options.ledger)))
    if os.path.lexists(out):
        raise OutputExists("already exists", where=out, hint="choose another folder")
    staging, lock = make_staging_directory(out)
    try:
        orders = [one.write(staging, audited, options.proposal, key) for one in sealing]
        write_file_atomically(staging / ATTESTATION, read_file(attestation, dsse.LARGEST))
        rename_exclusive(staging, out)
    finally:
        remove_tree(staging)  # gone if all went well
        os.close(lock)
    return Packed(str(out), tuple(order.client for order in orders), sum(order.sealed.size for order in orders))


@dataclass(frozen=True, slots=True)
class _Sealing:
    """A proxy to be sealed.

    Args:
        public: the client's key.
    """

    folder: Path
    release: Release
    public: Path

    def write(self, outbox: Path, audited: Attestation, proposal: ProposalOptions, key: SigningKey) -> Order:
        """Write sealed proxy and order. What is checked is what was sealed: each byte is read once."""
        digests: dict[str, str] = {}
        parts, client = PartDigests(), self.release.client
        pieces = sealed_pieces(self.folder, load_recipient(self.public), digests)
        stream_new_file(outbox / f"{client}.proxy", parts.through(pieces))
        if digests[PROXY_MANIFEST] != self.release.proxy_sha256:
            raise _unknown(self.folder)
        audited.require(folder_digest(digests), self.folder)
        order = Order(client, digests[PROXY_MANIFEST], folder_digest(digests), Parts(parts.finish()), proposal)
        write_file_atomically(outbox / f"{client}.order", order.signed(key).encode())
        return order


def _sealings(owner: Owner, folders: Sequence[Path], releases: Sequence[Release]) -> list[_Sealing]:
    """What is for whom: the ledger says it, whatever the folders are called. Raises InputError."""
    known = {release.proxy_id: release for release in releases}
    made = [_sealing(owner, folder, known) for folder in folders]
    clients = [one.release.client for one in made]
    doubled = next((client for client in clients if clients.count(client) > 1), None)
    if doubled is not None:
        raise InputError(f"two proxies are for client {doubled!r}", where="PROXY", hint="pack one round at a time")
    return made


def _sealing(owner: Owner, folder: Path, known: Mapping[str, Release]) -> _Sealing:
    release = known.get(read_manifest(folder, ProxyManifest).proxy_id)
    if release is None:
        raise _unknown(folder)
    return _Sealing(folder, release, owner.public_key(release.client))


def _unknown(folder: Path) -> InputError:
    return InputError("is not a proxy of this ledger", where=folder, hint="export it with --ledger")


def read_outbox(path: Path, key: VerifyKey) -> list[Consignment]:
    """What an outbox holds, verified: orders of the owner, for proxies that passed an audit and arrived unchanged.

    Args:
        key: the owner's public key.

    Raises:
        InputError: it is not an outbox. FormatError: a file is malformed or was damaged on its way here.
        SignatureError: the owner did not sign an order or the attestation, or a proxy was not audited.
        GateFailed: the audit did not pass.
    """
    orders = sorted(path.glob("*.order"))
    if not orders:
        raise InputError("is not an outbox", where=path, hint="make it: fedqsn courier-pack")
    audited = read_passed(path / ATTESTATION, key)
    return [_consignment(order, key, audited) for order in orders]


def _consignment(path: Path, key: VerifyKey, audited: Attestation) -> Consignment:
    text, sealed = read_file(path, dsse.LARGEST), path.with_suffix(".proxy")
    order = Order.opened(text, key, path)
    if path.stem != order.client:
        raise FormatError(f"is an order for client {order.client!r}", where=path, hint="pack the round again")
    audited.require(order.folder_sha256, path)
    if Parts.of(sealed) != order.sealed:
        raise FormatError("is not the sealed proxy of its order", where=sealed, hint="carry the outbox here again")
    return Consignment(order, text.decode(), sealed)
