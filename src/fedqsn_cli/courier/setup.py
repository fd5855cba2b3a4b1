"""`courier-init`, `courier-join` and `courier-approve`: who takes part, with keys that never leave their machines."""

from __future__ import annotations

import io
import json
import lzma
import re
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedqsn_cli import strictjson, validate
from fedqsn_cli.checkpoint.files import read_file, write_file_atomically
from fedqsn_cli.courier import kits
from fedqsn_cli.courier.layout import INVITATION, Invitation, Owner, Site
from fedqsn_cli.courier.site import TEMPLATE, SiteSettings
from fedqsn_cli.crypto.keys import fingerprint, keygen, load_recipient, load_verify_key
from fedqsn_cli.errors import FormatError, InputError, KeyFileError, OutputExists
from fedqsn_cli.options import CourierApproveOptions, CourierInitOptions, CourierJoinOptions, KeygenOptions

_LARGEST = 1 << 20  # bytes of a request or an approval
_DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError, ValueError, struct.error)
_KEY, _ASKED, _SIGNED = "site.pub", "request.zip", "signed.zip"
_REQUEST, _ANSWER = "request.json", "signed.json"  # in them
_FINGERPRINT = re.compile(r"SHA256:([0-9A-F]{2}:){31}[0-9A-F]{2}")


@dataclass(frozen=True, slots=True)
class CourierSetup:
    """The result of the three commands.

    Args:
        path: the folder. next: the file that goes to the other side, None where there is nothing to do.
        fingerprint: of the key that the other side should compare.
    """

    path: str
    next: str | None
    fingerprint: str


def courier_init(path: str | Path, options: CourierInitOptions) -> CourierSetup:
    """Make the owner's folder of a courier: certificates, the kit of the server, and the invitation for sites.

    Args:
        path: the folder to make.
        options: see `CourierInitOptions`.

    Raises:
        InputError: FLARE is not installed, or a name cannot be used. OutputExists: there is something at `path`.

    Example:
        >>> courier_init("courier", server="fl.example.org:443", key="owner.pub").next
    """
    kits.require_flare()
    home = Path(validate.here(path, "COURIER")).absolute()
    if home.exists():
        raise OutputExists("already exists", where=home, hint="choose another folder")
    public = Path(options.key)
    signer = fingerprint(load_verify_key(public))
    host, port = options.address
    draft = Invitation(options.project, host, port, "", _text(public))
    owner = Owner(home)
    with _new_folder(home):
        for folder in (home / "keys", owner.host.home, owner.host.carried):
            folder.mkdir(mode=0o700)
        root = kits.make_authority(owner.authority, draft)
        invitation = Invitation(draft.project, host, port, root, draft.owner)
        write_file_atomically(owner.invitation, invitation.to_bytes())
        write_file_atomically(owner.host.invitation, invitation.to_bytes())
        write_file_atomically(owner.host.owner_key, invitation.owner.encode())
        _make_kit(owner, invitation, host, "server", owner.host.server)
        _make_kit(owner, invitation, kits.ADMIN, "admin", owner.host.admin)
        for client in options.local or ():
            _join_here(owner, client)
    return CourierSetup(str(home), str(owner.invitation), signer)


@contextmanager
def _new_folder(home: Path) -> Iterator[None]:
    """Make a private folder, which is removed again if what fills it fails: kits hold its path, so it cannot move."""
    home.mkdir(parents=True, mode=0o700)
    try:
        yield
    except BaseException:
        shutil.rmtree(home)
        raise


def _text(public: Path) -> str:
    """The public keys of a file. Raises FormatError: there is something else in it."""
    try:
        return read_file(public, _LARGEST).decode("ascii")
    except UnicodeDecodeError:
        raise FormatError("holds more than keys in PEM", where=public, hint="give it without remarks") from None


def _make_kit(owner: Owner, invitation: Invitation, name: str, kind: kits.Kind, kit: Path) -> None:
    """Request, approve and package in one place."""
    requested = owner.home / "requests" / kind
    requested.parent.mkdir(exist_ok=True, mode=0o700)
    asked, signed = kits.request(requested, invitation, name, kind), requested.with_suffix(".signed.zip")
    kits.approve(owner.authority, invitation, asked, signed)
    kits.package(signed, requested, invitation, kit, kind)


def _join_here(owner: Owner, client: str) -> None:
    """A site on this machine, without data yet."""
    home = owner.home / "sites" / client
    joined = courier_join(owner.invitation, CourierJoinOptions(out=home, name=client, data=f"{client}.jsonl"))
    approved = courier_approve(owner.home, Path(str(joined.next)), CourierApproveOptions(out=home / "approval"))
    courier_join(owner.invitation, CourierJoinOptions(out=home, name=client, approval=approved.next))


def courier_join(path: str | Path, options: CourierJoinOptions) -> CourierSetup:
    """Join a courier as a site: make keys and a request; with the owner's approval, put the kit together.

    Args:
        path: the owner's invitation.
        options: see `CourierJoinOptions`.

    Raises:
        InputError: FLARE is not installed, or the approval does not belong to the request.
        FormatError: the invitation is malformed. OutputExists: there is something at `out`.

    Example:
        >>> courier_join("invitation.json", "site", name="alice", data="train.jsonl").next
    """
    kits.require_flare()
    invitation = Invitation.read(Path(path))
    _check_keys(invitation.owner.encode(), "owner", Path(path))
    if not _FINGERPRINT.fullmatch(invitation.root):
        raise FormatError("names no certificate", where=path, hint="ask the owner for it again")
    site = Site(Path(options.out).absolute())
    if options.approval is None:
        return _request(site, invitation, options)
    site = Site.open(site.home)
    signed = site.home / f"{options.name}.{_SIGNED}"
    signed.write_bytes(_answer(site, invitation, options.name, Path(options.approval)))
    kits.package(signed, site.home / "request", invitation, site.kit, "client")
    return CourierSetup(str(site.home), None, fingerprint(load_verify_key(site.owner_key)))


def _answer(site: Site, invitation: Invitation, name: str, approval: Path) -> bytes:
    """The certificate in an approval. Raises InputError, FormatError: it does not answer what the site asked for."""
    if site.kit.exists():
        raise OutputExists("has joined already", where=site.home, hint="serve it: fedqsn courier-serve")
    if Invitation.read(site.home / INVITATION) != invitation:
        raise InputError("has asked to join by another invitation", where=site.home, hint="give that one")
    asked = site.request(name)
    if not asked.exists():
        raise InputError(f"has not asked to join as {name!r}", where=site.home, hint="give the --name of its request")
    signed = _unpacked(approval, {_SIGNED})[_SIGNED]
    request = _told(_unpacked(asked, {_ASKED, _KEY})[_ASKED], _REQUEST, asked)
    if _told(signed, _ANSWER, approval).get("request_id") != request.get("request_id"):
        raise InputError("answers another request", where=approval, hint=f"ask the owner for the approval of {asked}")
    return signed


def _request(site: Site, invitation: Invitation, options: CourierJoinOptions) -> CourierSetup:
    if site.home.exists():
        raise OutputExists("already exists", where=site.home, hint="choose another folder, or give the --approval")
    validate.not_the_host([options.name], invitation.host, "--name")
    with _new_folder(site.home):
        site.rounds.mkdir(mode=0o700)
        write_file_atomically(site.home / INVITATION, invitation.to_bytes())
        site.owner_key.write_text(invitation.owner)
        pair = keygen(site.private_key, KeygenOptions())
        site.settings.write_text(_settings(options), encoding="utf-8")
        SiteSettings.read(site.settings)
        asked = kits.request(site.home / "request", invitation, options.name, "client")
        packed = site.request(options.name)
        _pack(packed, {_ASKED: asked.read_bytes(), _KEY: Path(pair.public).read_bytes()})
    return CourierSetup(str(site.home), str(packed), pair.fingerprint)


def _settings(options: CourierJoinOptions) -> str:
    evaluation = f"eval_data = {_quoted(options.eval_data)}\n" if options.eval_data is not None else ""
    return TEMPLATE.format(
        data=_quoted(options.data),
        eval_data=evaluation,
        device=_quoted(options.device),
        max_length=options.max_length,
    )


def _quoted(value: object) -> str:
    """Text as TOML has it: as JSON, which leaves one control character as it is."""
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def courier_approve(path: str | Path, request: str | Path, options: CourierApproveOptions) -> CourierSetup:
    """Approve a site's request: sign its certificate, and keep its public key under the client's name.

    Args:
        path: the owner's folder. request: from `courier_join`.
        options: see `CourierApproveOptions`.

    Raises:
        InputError: the request cannot be used, or another site has the name.

    Example:
        >>> courier_approve("courier", "alice.request", "alice.approval").fingerprint
    """
    owner, asked = Owner.open(path), Path(request)
    if Path(options.out).exists():
        raise OutputExists("already exists", where=options.out, hint="choose another path")
    parts = _unpacked(asked, {_ASKED, _KEY})
    client = _named(parts[_ASKED], asked)
    _check_keys(parts[_KEY], _KEY, asked)
    known = owner.home / "keys" / f"{client}.pub"
    if known.exists() and known.read_bytes() != parts[_KEY]:
        raise InputError(f"client {client!r} has joined with another key", where=known, hint="remove it to replace it")
    work = owner.home / "requests" / client
    invitation = Invitation.read(owner.invitation)
    shutil.rmtree(work, ignore_errors=True)
    with _new_folder(work):
        (work / f"{client}.request.zip").write_bytes(parts[_ASKED])
        kits.approve(owner.authority, invitation, work / f"{client}.request.zip", work / f"{client}.{_SIGNED}")
    write_file_atomically(known, parts[_KEY])
    _pack(Path(options.out), {_SIGNED: (work / f"{client}.{_SIGNED}").read_bytes()})
    return CourierSetup(str(owner.home), str(options.out), fingerprint(load_verify_key(known)))


def _check_keys(data: bytes, name: str, where: Path) -> None:
    """Refuse what holds no public keys, before they are kept as those of somebody. Raises FormatError.

    Args:
        name: of the part of `where` that should hold them.
    """
    with tempfile.TemporaryDirectory() as place:
        public = Path(place) / _KEY
        public.write_bytes(data)
        try:
            load_verify_key(public)
            load_recipient(public)
        except KeyFileError as error:
            raise FormatError(f"{name} in it {error.what}", where=where) from None


def _named(data: bytes, where: Path) -> str:
    """The client whose certificate a request asks for. Raises FormatError, InputError."""
    told = _told(data, _REQUEST, where)
    try:
        name, kind = str(told["name"]), told["cert_type"]
    except KeyError:
        raise FormatError("is not a request of a site", where=where) from None
    if kind != "client":
        raise InputError(f"asks for the certificate of a {kind}, not of a site", where=where)
    return validate.site(name, str(where))


def _told(data: bytes, name: str, where: Path) -> dict[str, Any]:
    """What FLARE wrote into a request or its answer. Raises FormatError."""
    kind = "a request of a site" if name == _REQUEST else "an approval"
    try:
        return dict(strictjson.loads(_entries(data)[name], where))
    except (KeyError, TypeError, ValueError, FormatError):
        raise FormatError(f"is not {kind}", where=where) from None


def _pack(path: Path, parts: dict[str, bytes]) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in parts.items():
            file.writestr(name, data)
    write_file_atomically(path, buffer.getvalue())


def _unpacked(path: Path, names: set[str]) -> dict[str, bytes]:
    """The parts of a request or an approval, none of which is ever written under its own name. Raises FormatError."""
    found = _entries(read_file(path, 2 * _LARGEST))
    if found.keys() != names:
        raise FormatError("is not a request or approval of a courier", where=path)
    return found


def _entries(data: bytes) -> dict[str, bytes]:
    """What a zip file holds, by name; nothing where it is none, is damaged, or inflates to more than `_LARGEST`."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            if sum(entry.file_size for entry in file.infolist()) > _LARGEST:
                return {}
            return {entry.filename: file.read(entry) for entry in file.infolist()}
    except _DAMAGED:
        return {}
