"""`courier-serve`, `courier-stop` and `courier-status`: the daemons of the owner's host and of a site."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from fedqsn_cli.courier import daemons, kits
from fedqsn_cli.courier.daemons import Daemon
from fedqsn_cli.courier.layout import INVITATION, Host, Invitation, Owner, Site
from fedqsn_cli.courier.rounds import Unreachable
from fedqsn_cli.courier.site import SiteSettings
from fedqsn_cli.errors import InputError
from fedqsn_cli.options import CourierServeOptions, CourierStatusOptions, CourierStopOptions

_FREED = 5.0  # seconds in which a server that was killed gives back its port


@dataclass(frozen=True, slots=True)
class Served:
    """The result of `courier_serve` and `courier_stop`.

    Args:
        stopped: whether a process was ended.
    """

    path: str
    stopped: bool


@dataclass(frozen=True, slots=True)
class CourierStatus:
    """The result of `courier_status`.

    Args:
        role: owner, host or site. process: that serves the folder, None if nobody does.
        joined: clients with a key; the owner knows them. connected: sites at the server, None where that is not known.
    """

    path: str
    role: str
    server: str
    process: int | None
    joined: tuple[str, ...]
    connected: tuple[str, ...] | None


def courier_serve(path: str | Path, options: CourierServeOptions) -> Served:
    """Run FLARE's daemons of a folder until `courier_stop`, SIGTERM or SIGINT; those that die are started again.

    Args:
        path: the owner's folder, with its sites on this machine, that of the host, or that of a site.
        options: see `CourierServeOptions`.

    Raises:
        InputError: there is no such folder, the owner has not approved the site yet, it is served already, the
            certificates or the port cannot be used, a kit is another client's, or site.toml is malformed or names no
            data.

    Example:
        >>> courier_serve("site").path
    """
    kits.require_flare()
    home = Path(path).absolute()
    locks, served = [_served(home), *_sites(home, options)], _daemons(home, options)
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with ExitStack() as held:
            for lock in locks:
                held.enter_context(daemons.serving(lock))
            _require_port(home, served)
            daemons.keep_alive(served, ended)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return Served(str(home), True)


def _sites(home: Path, options: CourierServeOptions) -> list[Path]:
    """The folders of the sites on this machine that the owner's folder serves."""
    return [] if options.server_only else [site.home for site in Owner(home).sites()]


def _require_port(home: Path, served: Sequence[Daemon]) -> None:
    """FLARE would go on without the port, and say nothing. Raises InputError: the server cannot have it."""
    if served[0].name is not None:
        return
    served[0].end_workers()  # an earlier server whose `courier-serve` was killed may still have it
    port = Invitation.read(Host.open(home).invitation).port
    deadline = time.monotonic() + _FREED
    while (problem := _taken(port)) is not None:
        if time.monotonic() > deadline:
            hint = "end the program that has it, or make the courier with another --server"
            raise InputError(f"port {port} of this machine cannot be used ({problem})", where=home, hint=hint)
        time.sleep(0.1)


def _taken(port: int) -> str | None:
    """Why no server can listen at a port of this machine; None if one can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended do not count
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.strerror
    return None


def _daemons(home: Path, options: CourierServeOptions) -> list[Daemon]:
    if (home / "site.toml").exists():
        return [_site(Site.open(home))]
    server = Host.open(home).server
    kits.require_valid(server)
    kits.place_server(server)
    return [Daemon(None, server), *(_site(site) for site in Owner(home).sites() if not options.server_only)]


def _served(path: str | Path) -> Path:
    """The folder whose lock a server or site holds. Raises InputError: it is not a folder of a courier."""
    return Path(path).absolute() if (Path(path) / "site.toml").exists() else Host.open(path).home


def _site(site: Site) -> Daemon:
    if not site.kit.is_dir():
        hint = "give the owner its request, then: fedqsn courier-join INVITATION --out SITE --approval FILE"
        raise InputError("the owner has not approved this site yet", where=site.home, hint=hint)
    kits.require_valid(site.kit)
    SiteSettings.read(site.settings).require_data(site.settings)  # what is wrong shows now, not when a proxy comes
    client = kits.client_of(site.kit)
    if not site.request(client).exists():
        hint = "put back the kit that belongs here"
        raise InputError(
            f"is the kit of client {client!r}, as which this site never asked to join", where=site.kit, hint=hint
        )
    kits.place_site(site.kit)
    return Daemon(client, site.kit)


def courier_stop(path: str | Path, options: CourierStopOptions) -> Served:
    """End the daemons of a folder.

    Args:
        path: the folder that is served.
        options: see `CourierStopOptions`.

    Raises:
        InputError: there is no such folder.

    Example:
        >>> courier_stop("site").stopped
    """
    return Served(str(Path(path).absolute()), daemons.stop(_served(path)))


def courier_status(path: str | Path, options: CourierStatusOptions) -> CourierStatus:
    """Tell who serves a folder, which clients have joined, and which sites are connected.

    Args:
        path: the owner's folder, that of the host, or that of a site.
        options: see `CourierStatusOptions`.

    Raises:
        InputError: there is no such folder.

    Example:
        >>> courier_status("courier").connected
    """
    home, served = Path(path).absolute(), _served(path)
    invitation = Invitation.read(served / INVITATION)
    address, process = f"{invitation.host}:{invitation.port}", daemons.server_of(served)
    if (home / "site.toml").exists():
        return CourierStatus(str(home), "site", address, process, (), None)
    joined = tuple(sorted(path.stem for path in (home / "keys").glob("*.pub")))
    role = "host" if served == home else "owner"
    return CourierStatus(str(home), role, address, process, joined, _connected(Host(served)))


def _connected(host: Host) -> tuple[str, ...] | None:
    """The sites at the server; None if it does not answer."""
    kits.require_flare()
    from fedqsn_cli.courier.flare.session import Session

    session = Session(host.admin)
    try:
        return tuple(session.sites())
    except Unreachable:
        return None
    finally:
        session.close()
