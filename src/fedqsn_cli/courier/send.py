"""`courier-send`: the proxies of a round to their clients, and the updates back, until enough have come.

Every client has a job of its own. One that fails is submitted again, and goes on with the parts that it has.
"""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fedqsn_cli.checkpoint.files import require_file_target
from fedqsn_cli.courier import kits
from fedqsn_cli.courier.layout import Host, Owner
from fedqsn_cli.courier.outbox import Consignment, read_outbox
from fedqsn_cli.courier.rounds import Delivery, Opened, Sealed, Unreachable
from fedqsn_cli.crypto.keys import load_opening_key, load_recipient, load_verify_key
from fedqsn_cli.errors import GateFailed, InputError, RefusedUpdate
from fedqsn_cli.options import CourierSendOptions
from fedqsn_cli.progress import SILENT, Progress

if TYPE_CHECKING:
    from fedqsn_cli.courier.flare.session import Session

_POLL = 1.0  # seconds
_LOOK = 5.0  # seconds between two looks at who is at work
_IDLE_LOOKS = 4  # a site that so often was connected, and not at work on its running job, has lost it
_RETRY = (2.0, 60.0)  # seconds before a failed job is submitted again: the first time, and at most


@dataclass(frozen=True, slots=True)
class SentClient:
    """What has become of one client.

    Args:
        state: arrived, waiting, or refused. update: the folder or the sealed file, if it arrived.
        jobs: how often it was submitted.
    """

    client: str
    state: str
    update: str | None
    jobs: int


@dataclass(frozen=True, slots=True)
class SendResult:
    """The result of `courier_send`."""

    clients: tuple[SentClient, ...]
    arrived: int
    seconds: float


def courier_send(
    path: str | Path, outbox: str | Path, options: CourierSendOptions, *, progress: Progress = SILENT
) -> SendResult:
    """Send the sealed proxies of an outbox to their clients, and wait for sealed, signed updates.

    Args:
        path: the host's folder, whose server is running (`courier-serve`), or the owner's. outbox: of `courier-pack`.
        options: see `CourierSendOptions`.
        progress: told of what happens.

    Raises:
        InputError: it is not an outbox, the inbox holds other updates, another process sends it, or the certificates
            cannot be used; nothing was sent then.
        SignatureError: the owner did not sign an order or the attestation. FormatError: a file was damaged.
        GateFailed: the audit did not pass, or too few updates came in time. Run it again, and it goes on.

    Example:
        >>> courier_send("courier", "outbox", into="updates", key="owner.key", at_least=1).arrived
    """
    kits.require_flare()
    host = Host.open(path)
    sent = read_outbox(Path(outbox), load_verify_key(host.owner_key))
    least = options.at_least if options.at_least is not None else len(sent)
    if least > len(sent):
        raise InputError(f"there are {len(sent)} proxies", where="--at-least", hint="give a smaller number")
    deliveries = [_delivery(host, path, one, options) for one in sent]
    for delivery in deliveries:
        delivery.check()
    _require_writable(Path(options.into))
    from fedqsn_cli.courier.flare.session import Session

    with ExitStack() as held:
        for delivery in deliveries:
            held.enter_context(delivery.alone())
        session = Session(host.admin)
        held.callback(session.close)
        clients = [_Client(delivery) for delivery in deliveries]
        return Sending(session, clients, progress).run(least, options.seconds)


def _delivery(host: Host, path: str | Path, sent: Consignment, options: CourierSendOptions) -> Delivery:
    """With the owner's key, updates are opened; without it, they stay sealed. Raises InputError, KeyFileError."""
    inbox = Path(options.into)
    if options.key is None:
        return Sealed(sent, host.carried, inbox)
    if load_opening_key(options.key).public_key() != load_recipient(host.owner_key):
        raise InputError("is not the key that updates are sealed for", where=options.key, hint="give the owner's own")
    return Opened(sent, host.carried, inbox, Path(options.key), Owner.open(path).public_key(sent.order.client))


def _require_writable(inbox: Path) -> None:
    """Refuse now what would stop the first update, perhaps in hours. Raises InputError."""
    place = inbox.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise InputError("is not a folder", where=place, hint="give a folder for the updates of this round")
    try:
        require_file_target(place / ".new")
    except InputError as error:
        raise InputError(error.what, where=inbox, hint="give a folder for the updates of this round") from None


@dataclass(slots=True)
class _Client:
    delivery: Delivery
    job: str | None = None
    jobs: int = 0
    next: float = 0.0
    refused: bool = False
    idle: int = 0

    @property
    def state(self) -> str:
        return "arrived" if self.delivery.done else "refused" if self.refused else "waiting"

    def result(self) -> SentClient:
        update = str(self.delivery.update) if self.delivery.done else None
        return SentClient(self.delivery.client, self.state, update, self.jobs)


@dataclass(slots=True)
class Sending:
    """A round on its way."""

    session: Session
    clients: list[_Client]
    progress: Progress
    _began: float = field(default_factory=time.monotonic)
    _next_look: float = 0.0

    def run(self, least: int, seconds: float) -> SendResult:
        """Wait until enough have answered; no job is left then. Raises GateFailed: too few did in time."""
        try:
            self._wait(least, seconds)
        finally:
            self._end_others()
        if self.arrived < least:
            told = ", ".join(f"{client.delivery.client} {client.state}" for client in self.clients)
            hint = "run the same command again: it goes on where it was"
            raise GateFailed(f"{self.arrived} of {least} updates came in time ({told})", hint=hint)
        return SendResult(tuple(c.result() for c in self.clients), self.arrived, time.monotonic() - self._began)

    def _wait(self, least: int, seconds: float) -> None:
        while self.arrived < least and any(c.state == "waiting" for c in self.clients):
            if time.monotonic() - self._began > seconds:
                break
            for client in [c for c in self.clients if c.state == "waiting"]:
                try:
                    self._look(client)
                except Unreachable as error:
                    self._later(client, f"the server does not answer ({error})")
                    break  # it would not answer for the others, and each attempt takes seconds
            else:
                self._find_lost()
            time.sleep(_POLL)

    @property
    def arrived(self) -> int:
        """How many updates were taken."""
        return sum(client.delivery.done for client in self.clients)

    def _look(self, client: _Client) -> None:
        """Take what has come; submit the job if there is none, or if it has failed. Raises Unreachable."""
        if client.delivery.sealed_update.exists():
            self._take(client)
        elif client.job is None:
            if time.monotonic() >= client.next:
                self._submit(client)
        elif (status := self.session.status(client.job)).startswith("FINISHED"):
            self._later(client, f"its job ended ({status.lower()})")

    def _find_lost(self) -> None:
        """Submit jobs again that a site has lost: it was killed, and started again.

        FLARE itself would wait for such a site until it has been silent for ten minutes.
        """
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _LOOK
        try:
            at_work = self.session.at_work()
            for client in [c for c in self.clients if c.state == "waiting" and c.job is not None]:
                self._judge(client, at_work.get(client.delivery.client))
        except Unreachable as error:
            self.progress.note(f"the server does not answer ({error})")

    def _judge(self, client: _Client, jobs: set[str] | None) -> None:
        """Count how often a connected site did not work on its running job."""
        job = str(client.job)
        idle = jobs is not None and job not in jobs and self.session.status(job) == "RUNNING"
        client.idle = client.idle + 1 if idle else 0
        if client.idle >= _IDLE_LOOKS:
            self.session.abort(job)
            self._later(client, "the site has lost its job")

    def _take(self, client: _Client) -> None:
        try:
            client.delivery.take()
            self.progress.note(f"the update of {client.delivery.client} has come")
        except RefusedUpdate as error:
            client.refused = True
            self.progress.note(error.what)
        except OSError as error:  # of reading or writing, which name no file
            raise OSError(error.errno, error.strerror, str(client.delivery.inbox)) from error

    def _submit(self, client: _Client) -> None:
        from fedqsn_cli.courier.flare.job import write_job

        if not client.jobs:  # of an earlier send that was killed: two at once would fetch one update into one file
            for left in self.session.unfinished(client.delivery.sent.name):
                self.session.abort(left)
        with tempfile.TemporaryDirectory() as place:
            job = write_job(Path(place) / "job", client.delivery.sent, client.delivery.sealed_update)
            client.job = self.session.submit(job)
        client.jobs += 1

    def _later(self, client: _Client, why: str) -> None:
        """Try again after a while, longer each time."""
        first, most = _RETRY
        wait = min(most, first * 2.0 ** min(client.jobs, 10))
        client.job, client.idle, client.next = None, 0, time.monotonic() + wait
        self.progress.note(f"{client.delivery.client}: {why}; again in {wait:.0f} s")

    def _end_others(self) -> None:
        """Jobs that nobody waits for any more."""
        try:
            for client in self.clients:
                if client.job is not None and not client.delivery.done:
                    self.session.abort(client.job)
        except Unreachable as error:
            self.progress.note(f"jobs could not be ended ({error}); sending the same proxies again ends them")
