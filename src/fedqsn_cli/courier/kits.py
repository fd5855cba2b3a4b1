"""FLARE's certificates and start-up kits: made with its own tool, and settled so that a kit can do nothing else.

A request is made where the private key stays; the owner signs it; the kit is put together where the key is.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256

from fedqsn_cli.checkpoint.files import read_file, write_file_atomically
from fedqsn_cli.courier.layout import INVITATION, Invitation, read_json
from fedqsn_cli.errors import FormatError, InputError

Kind = Literal["server", "client", "admin"]

ADMIN = "owner@fedqsn.local"
ALLOWED = ["fedqsn_cli.courier.flare."]
"""Prefixes of the classes that a job may name."""

_LAUNCHER = {"id": "process_launcher", "args": {}}  # FLARE's own takes no folder with a space in its name
_LAUNCHERS = {
    "server": "fedqsn_cli.courier.flare.launch.ServerLauncher",
    "client": "fedqsn_cli.courier.flare.launch.SiteLauncher",
}
_DEPOT = {"id": "courier_depot", "path": "fedqsn_cli.courier.flare.depot.CourierDepot"}
_ROLE = "lead"  # may submit jobs and end its own, and nothing else
_ORGANISATION = "fedqsn"
_AUTHORITY = "rootCA.pem"
_LARGEST = 1 << 20  # bytes of a certificate


def require_flare() -> None:
    """Raises InputError: FLARE is not installed."""
    try:
        import nvflare  # noqa: F401
    except ImportError:
        hint = "install it: python -m pip install 'fedqsn-cli[flare]'"
        raise InputError("the courier needs NVIDIA FLARE", where="nvflare", hint=hint) from None


def make_authority(folder: Path, invitation: Invitation) -> str:
    """Make the project's certificate authority. Returns the fingerprint of its certificate."""
    with _profile(invitation) as profile:
        _nvflare("cert", "init", "--profile", str(profile), "-o", str(folder))  # with --org, chains break
    return str(json.loads((folder / "ca.json").read_text())["rootCA_fingerprint"])


def request(folder: Path, invitation: Invitation, name: str, kind: Kind) -> Path:
    """Make a private key and a request for its certificate. Returns the request, a zip file without the key."""
    participant = {"name": name, "org": _ORGANISATION, "type": kind} | ({"role": _ROLE} if kind == "admin" else {})
    with tempfile.TemporaryDirectory() as place:
        asked = Path(place) / "participant.yaml"
        asked.write_text(json.dumps({"name": invitation.project, "participants": [participant]}))
        _nvflare("cert", "request", "-p", str(asked), "--out", str(folder))
    return folder / f"{name}.request.zip"


def approve(authority: Path, invitation: Invitation, asked: Path, signed: Path) -> None:
    """Sign a request."""
    with _profile(invitation) as profile:
        words = ("-c", str(authority), "--profile", str(profile), "--out", str(signed))
        _nvflare("cert", "approve", str(asked), *words)


def package(signed: Path, requested: Path, invitation: Invitation, kit: Path, kind: Kind) -> None:
    """Put a kit together from a signed request and the private key, and settle what it may do.

    Raises:
        InputError: the certificates are not those of the invitation.
    """
    with tempfile.TemporaryDirectory(dir=kit.parent) as place:
        words = ("--request-dir", str(requested), "--fingerprint", invitation.root)
        _nvflare("package", str(signed), "-w", place, *words)
        (made,) = (Path(place) / invitation.project).glob("prod_*/*")
        _settle(made / "local", kind)
        shutil.move(made, kit)
    os.chmod(kit, 0o700)


def require_valid(kit: Path) -> None:
    """Refuse a kit that cannot connect: FLARE would try again and again, and say why in its own log only.

    Raises:
        InputError: a certificate has expired, is not valid yet by this machine's clock, or is of another courier.
    """
    startup, now = kit / "startup", datetime.now(UTC)
    for path in (startup / _AUTHORITY, *sorted(startup.glob("*.crt"))):
        certificate = _certificate(path)
        begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if now < begins:
            raise InputError(f"is not valid before {begins:%Y-%m-%d}", where=path, hint="set this machine's clock")
        if now > ends:
            hint = "if this machine's clock is right, join again (a site) or make the courier anew (the owner)"
            raise InputError(f"has expired on {ends:%Y-%m-%d}", where=path, hint=hint)
    root = Invitation.read(kit.parent / INVITATION).root.removeprefix("SHA256:").replace(":", "")
    if _certificate(startup / _AUTHORITY).fingerprint(SHA256()).hex() != root.lower():
        raise InputError("is the kit of another courier", where=kit, hint="put back the kit that belongs here")


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(read_file(path, _LARGEST))
    except ValueError:
        raise FormatError("is not a certificate", where=path, hint="put back the kit that belongs here") from None


def client_of(kit: Path) -> str:
    """The name under which a site's kit connects. Raises InputError, FormatError."""
    path = kit / "startup" / "fed_client.json"
    with _settings(path) as document:
        return str(document["client"]["fqsn"])


def place_server(kit: Path) -> None:
    """Let a server keep its state in its kit, not in /tmp, wherever the kit is now, and carry the files of its jobs.

    Raises InputError, FormatError.
    """
    path = kit / "local" / "resources.json"
    with _settings(path) as document:
        document["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(kit / "snapshots")
        jobs = next(one for one in document["components"] if one["id"] == "job_manager")
        jobs["args"] = jobs.get("args", {}) | {"uri_root": str(kit / "jobs")}
        _place(document, _LAUNCHER | {"path": _LAUNCHERS["server"]}, _DEPOT | {"args": {"kit": str(kit)}})
    write_file_atomically(path, json.dumps(document, indent=2).encode())


def place_site(kit: Path) -> None:
    """Let a site start its workers in its kit, wherever that is now. Raises InputError, FormatError."""
    path = kit / "local" / "resources.json"
    with _settings(path) as document:
        _place(document, _LAUNCHER | {"path": _LAUNCHERS["client"]})
    write_file_atomically(path, json.dumps(document, indent=2).encode())


def _place(document: Any, *components: dict[str, Any]) -> None:
    """Put components into the settings of a kit, in place of those of the same name."""
    names = {one["id"] for one in components}
    document["components"] = [*(one for one in document["components"] if one["id"] not in names), *components]


@contextmanager
def _settings(path: Path) -> Iterator[Any]:
    """A file of a kit, for a block that takes from it what FLARE has put there. Raises InputError, FormatError."""
    document = read_json(path)
    try:
        yield document
    except (LookupError, TypeError, AttributeError, StopIteration):
        raise FormatError("is not as FLARE makes it", where=path, hint="put back the kit that belongs here") from None


def _settle(local: Path, kind: Kind) -> None:
    """No code in jobs, no shell, no logs that leave, only our classes."""
    for name in ("resources.json", "authorization.json"):
        default = local / f"{name}.default"
        if default.exists():
            document = json.loads(default.read_text())
            settled = _resources(document, kind) if name == "resources.json" else _authorization(document)
            (local / name).write_text(json.dumps(settled, indent=2))


def _resources(document: dict[str, Any], kind: Kind) -> dict[str, Any]:
    if kind == "admin":
        return document
    document |= {"class_list_enforcement_mode": "enforce", "class_allow_list": ALLOWED}
    if kind == "client":
        kept = [one for one in document["components"] if one["id"] != "site_log_streamer"]
        return document | {"allow_log_streaming": False, "components": kept}
    scheduler = next(one for one in document["components"] if one["id"] == "job_scheduler")
    often = {"max_jobs": 10_000, "min_schedule_interval": 1.0, "max_schedule_interval": 15.0}
    scheduler["args"] = scheduler.get("args", {}) | often
    return document


def _authorization(document: dict[str, Any]) -> dict[str, Any]:
    """Of all rights, the owner's session keeps those to send jobs, to look at them and to end them."""
    rights = {"submit_job": "any", "manage_job": "n:submitter", "view": "any", "byoc": "none", "shell_commands": "none"}
    return document | {"permissions": {_ROLE: rights}}


@contextmanager
def _profile(invitation: Invitation) -> Iterator[Path]:
    """The project as FLARE's tool reads it; JSON is YAML."""
    server = {"host": invitation.host, "fed_learn_port": invitation.port, "admin_port": invitation.port}
    document = {"name": invitation.project, "scheme": "grpc", "connection_security": "mtls", "server": server}
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "profile.yaml"
        path.write_text(json.dumps(document))
        yield path


def _nvflare(*words: str) -> None:
    """Run FLARE's tool; what it notes down in the user's home goes elsewhere. Raises InputError: it failed."""
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            [sys.executable, "-m", "nvflare.cli", *words],
            env=os.environ | {"HOME": home},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise InputError(lines[0] if lines else "failed", where=f"nvflare {' '.join(words[:2])}")
