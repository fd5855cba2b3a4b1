"""`courier-send`: the proxies of a round to their clients, and the updates back, until enough have come.

Every client has a job of its own. One that fails is submitted again, and goes on with the parts that it has.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fedqsn_cli.artifacts import ledger as ledgers
from fedqsn_cli.courier import kits
from fedqsn_cli.courier.layout import Owner
from fedqsn_cli.courier.recipe import Recipe
from fedqsn_cli.courier.rounds import Delivery, Unreachable, deliveries
from fedqsn_cli.crypto.attestation import require_attested
from fedqsn_cli.crypto.keys import load_signing_key
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
        state: arrived, waiting, or refused. update: the folder, if it arrived. jobs: how often it was submitted.
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
    path: str | Path, proxies: Sequence[str | Path], options: CourierSendOptions, *, progress: Progress = SILENT
) -> SendResult:
    """Send audited proxies to their clients, sealed, and wait for signed updates.

    Args:
        path: the owner's folder, whose server is running (`courier-serve`). proxies: of one round.
        options: see `CourierSendOptions`.
        progress: told of what happens.

    Raises:
        InputError: a proxy is not in the ledger or not attested, or a client has not joined; nothing was sent then.
        GateFailed: the audit did not pass, or too few updates came in time. Run it again, and it goes on.

    Example:
        >>> courier_send("courier", ["proxies/alice"], into="inbox", key="owner.key", ledger="ledger.jsonl",
        ...              attestation="audit.intoto.json", at_least=1).arrived
    """
    kits.require_flare()
    owner, key = Owner.open(path), load_signing_key(options.key)
    folders = [Path(proxy) for proxy in ([proxies] if isinstance(proxies, str | Path) else proxies)]
    least = options.at_least if options.at_least is not None else len(folders)
    if least > len(folders):
        raise InputError(f"there are {len(folders)} proxies", where="--at-least", hint="give a smaller number")
    require_attested(Path(options.attestation), key.public_key(), folders, options.policy)
    recipe = Recipe(options.epochs, options.lr, options.batch_size, options.update_format)
    releases = ledgers.read(Path(options.ledger))
    known = deliveries(owner, folders, Path(options.into), releases, recipe, key)
    from fedqsn_cli.courier.flare.session import Session

    session = Session(owner.admin)
    try:
        return Sending(session, [_Client(delivery) for delivery in known], Path(options.key), progress).run(
            least, options.seconds
        )
    finally:
        session.close()


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
    key: Path
    progress: Progress
    _began: float = field(default_factory=time.monotonic)
    _next_look: float = 0.0

    def run(self, least: int, seconds: float) -> SendResult:
        """Wait until enough have answered. Raises GateFailed: too few did in time."""
        for client in self.clients:
            client.delivery.prepare()
        while self.arrived < least and any(c.state == "waiting" for c in self.clients):
            if time.monotonic() - self._began > seconds:
                break
            for client in [c for c in self.clients if c.state == "waiting"]:
                try:
                    self._look(client)
                except Unreachable as error:
                    self._later(client, f"the server does not answer ({error})")
            self._find_lost()
            time.sleep(_POLL)
        self._end_others()
        if self.arrived < least:
            told = ", ".join(f"{client.delivery.client} {client.state}" for client in self.clients)
            hint = "run the same command again: it goes on where it was"
            raise GateFailed(f"{self.arrived} of {least} updates came in time ({told})", hint=hint)
        return SendResult(tuple(c.result() for c in self.clients), self.arrived, time.monotonic() - self._began)

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
            client.delivery.take(self.key)
            self.progress.note(f"the update of {client.delivery.client} has come")
        except RefusedUpdate as error:
            client.refused = True
            self.progress.note(error.what)

    def _submit(self, client: _Client) -> None:
        from fedqsn_cli.courier.flare.job import write_job

        delivery = client.delivery
        with tempfile.TemporaryDirectory() as place:
            job = write_job(
                Path(place) / "job", delivery.client, delivery.sealed_proxy, delivery.sealed_update, delivery.recipe
            )
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
        for client in self.clients:
            if client.job is not None and not client.delivery.done:
                try:
                    self.session.abort(client.job)
                except Unreachable as error:
                    self.progress.note(f"{client.delivery.client}: its job could not be ended ({error})")
