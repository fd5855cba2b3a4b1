"""The folders of the courier: what is where.

The owner's, private (in the strongroom, if there is one):

    invitation.json         project, server and the owner's public keys, for all sites
    ca/                     the certificate authority of the project
    keys/CLIENT.pub         public keys of the sites
    host/                   what the server's machine needs: it serves it here, or is given a copy
    sites/CLIENT            with --local: the sites, on the same machine

The host's, where the server runs; nothing in it opens a proxy or an update:

    invitation.json, owner.pub
    server/, admin/         FLARE's start-up kits of the server and of the owner's session
    carried/                sealed updates on their way, ID.update, and a lock for each proxy that is being sent

A site's, private:

    invitation.json         what the owner gave; site.toml: the site's own settings; site.key, site.pub
    kit/                    FLARE's start-up kit
    rounds/                 proxies and updates of this site; NAME.answered for each that was answered
    courier.log             what was asked for, and what was done
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from fedqsn_cli import strictjson, validate
from fedqsn_cli.checkpoint.files import read_file
from fedqsn_cli.errors import FormatError, InputError

FORMAT = "fedqsn-courier/1"
INVITATION = "invitation.json"
_LARGEST = 1 << 20


@dataclass(frozen=True, slots=True)
class Invitation:
    """What sites must know of a project.

    Args:
        project: its name. host, port: of the server. root: fingerprint of the authority's certificate.
        owner: the owner's public keys in PEM.
    """

    project: str
    host: str
    port: int
    root: str
    owner: str

    def to_bytes(self) -> bytes:
        """As a file."""
        return strictjson.pretty({"format": FORMAT, **asdict(self)}).encode()

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read an invitation. Raises InputError, FormatError."""
        document = read_json(path)
        try:
            if document.pop("format") == FORMAT:
                made = cls(**document)
                texts = (validate.project(made.project), validate.host(made.host), made.root, made.owner)
                if all(type(x) is str for x in texts) and type(made.port) is int and 0 < made.port < 65536:
                    return made
        except (AttributeError, KeyError, TypeError, InputError):
            pass
        raise FormatError("is not an invitation of a courier", where=path, hint="it comes from 'fedqsn courier-init'")


def read_json(path: Path) -> Any:
    """A small JSON file. Raises InputError, FormatError."""
    return strictjson.loads(read_file(path, _LARGEST), path)


@dataclass(frozen=True, slots=True)
class Owner:
    """The owner's folder."""

    home: Path

    @classmethod
    def open(cls, home: str | Path) -> Self:
        """Raises InputError: it is not one."""
        if not (Path(home) / "ca").is_dir():
            raise InputError("is not the owner's folder of a courier", where=home, hint="make it: fedqsn courier-init")
        return cls(Path(home).absolute())

    @property
    def invitation(self) -> Path:
        """For all sites."""
        return self.home / INVITATION

    @property
    def authority(self) -> Path:
        """Certificates are signed here."""
        return self.home / "ca"

    @property
    def host(self) -> Host:
        """What the server's machine needs."""
        return Host(self.home / "host")

    def public_key(self, client: str) -> Path:
        """Of a site. Raises InputError: it has not joined."""
        path = self.home / "keys" / f"{validate.client(client)}.pub"
        if not path.exists():
            hint = f"approve its request: fedqsn courier-approve {self.home} REQUEST"
            raise InputError(f"client {client!r} has not joined", where=path, hint=hint)
        return path

    def sites(self) -> list[Site]:
        """The sites on this machine (--local)."""
        return [Site(path) for path in sorted((self.home / "sites").glob("*"))]


@dataclass(frozen=True, slots=True)
class Host:
    """The host's folder: of the machine that sites connect to."""

    home: Path

    @classmethod
    def open(cls, home: str | Path) -> Self:
        """The host's folder, or that in the owner's. Raises InputError: there is none."""
        for folder in (Path(home), Path(home) / "host"):
            if (folder / "server").is_dir():
                return cls(folder.absolute())
        hint = "give the folder of 'fedqsn courier-init', or the folder host/ in it"
        raise InputError("is not a folder of a courier", where=home, hint=hint)

    @property
    def invitation(self) -> Path:
        """As the sites have it."""
        return self.home / INVITATION

    @property
    def owner_key(self) -> Path:
        """The owner's public key."""
        return self.home / "owner.pub"

    @property
    def server(self) -> Path:
        """The kit of the server."""
        return self.home / "server"

    @property
    def admin(self) -> Path:
        """The kit of the owner's session."""
        return self.home / "admin"

    @property
    def carried(self) -> Path:
        """Sealed updates on their way."""
        return self.home / "carried"


@dataclass(frozen=True, slots=True)
class Site:
    """A site's folder."""

    home: Path

    @classmethod
    def open(cls, home: str | Path) -> Self:
        """Raises InputError: it is not one."""
        if not (Path(home) / "site.toml").is_file():
            raise InputError("is not the folder of a site", where=home, hint="make it: fedqsn courier-join")
        return cls(Path(home).absolute())

    @property
    def kit(self) -> Path:
        """FLARE's start-up kit; it exists when the owner has approved."""
        return self.home / "kit"

    def request(self, name: str) -> Path:
        """What the site asked the owner to sign, for the client of this name."""
        return self.home / f"{name}.request"

    @property
    def settings(self) -> Path:
        """What the site decides."""
        return self.home / "site.toml"

    @property
    def private_key(self) -> Path:
        """It never leaves the site."""
        return self.home / "site.key"

    @property
    def owner_key(self) -> Path:
        """The owner's public key, from the invitation."""
        return self.home / "owner.pub"

    @property
    def rounds(self) -> Path:
        """Proxies and updates."""
        return self.home / "rounds"

    @property
    def log(self) -> Path:
        """What was asked for, and what was done."""
        return self.home / "courier.log"
