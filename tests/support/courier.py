"""A courier without FLARE, for tests: an owner, sites, a round that passed its audit, and a host in this process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedqsn_cli import courier_pack, export_proxy
from fedqsn_cli.courier.layout import Host, Invitation, Owner, Site
from fedqsn_cli.courier.parts import Part, Parts, PartWriter, fetch_file
from fedqsn_cli.courier.site import TEMPLATE
from fedqsn_cli.courier.work import NoUpdate, SiteRound
from fedqsn_cli.crypto.attestation import Attestation, attestation_bytes
from fedqsn_cli.crypto.keys import load_signing_key
from fedqsn_cli.errors import FedqsnError, InputError
from support.helpers import make_model, send
from support.signing import Party, digest_of, party, sign_folder

CLIENTS = ("alice", "bob")


@dataclass(frozen=True)
class Desk:
    """The owner's folder with everything of a job in it, and the folders of two sites beside it."""

    home: Path

    @property
    def owner(self) -> Owner:
        return Owner(self.home / "courier")

    @property
    def key(self) -> Party:
        return Party(self.home / "owner.key", self.home / "owner.pub")

    @property
    def secrets(self) -> dict[str, Path]:
        return {"key": self.home / "job.key", "ledger": self.home / "ledger"}

    def site(self, name: str) -> Site:
        return Site(self.home.parent / "sites" / name)

    def proxy(self, name: str, number: int = 1) -> Path:
        return self.home / f"out-{number}" / name

    def export(self, number: int) -> None:
        """Proxies of a round, and the verdict of an audit that passed."""
        export_proxy(
            self.home / "model", self.home / f"out-{number}/{{client}}", client=list(CLIENTS), round=number, p1=0.1,
            p2=0.1, format="none", sign=self.key.private, allow_untrainable=True, **self.secrets,
        )  # fmt: skip
        self.attest(number)

    def attest(self, number: int, result: str = "PASSED") -> Path:
        digests = {name: digest_of(self.proxy(name, number)) for name in CLIENTS}
        told = Attestation(result, result.lower(), "fedqsn", "0" * 64, digests, [], [])
        path = self.home / f"{number}.json"
        path.write_bytes(attestation_bytes(told, load_signing_key(self.key.private)))
        return path

    def pack(self, out: str = "outbox", *folders: Path, number: int = 1, **options: Any) -> Path:
        """Seal a round; returns the outbox."""
        given = {"key": self.key.private, "ledger": self.secrets["ledger"], "attestation": self.home / f"{number}.json"}
        proxies = folders or [self.proxy(name, number) for name in CLIENTS]
        return Path(courier_pack(self.owner.home, proxies, self.home.parent / out, **given | options).path)


def make_desk(place: Path) -> Desk:
    """An owner, two sites that have joined, and their proxies of round 1."""
    desk = Desk(place / "strongroom")
    for folder in ("ca", "keys", "host/server", "host/carried"):
        (desk.owner.home / folder).mkdir(parents=True)
    owner = party(desk.home, "owner")
    host = desk.owner.host
    host.owner_key.write_bytes(owner.public.read_bytes())
    host.invitation.write_bytes(Invitation("test", "localhost", 1, "", owner.public.read_text()).to_bytes())
    for name in CLIENTS:
        site = desk.site(name)
        site.rounds.mkdir(parents=True)
        shutil.copy(party(site.home, "site").public, desk.owner.home / "keys" / f"{name}.pub")
        site.owner_key.write_bytes(owner.public.read_bytes())
        write_settings(site)
    make_model(desk.home / "model", "bert")
    desk.export(1)
    return desk


def write_settings(site: Site) -> None:
    """site.toml as `courier-join` writes it."""
    site.settings.write_text(TEMPLATE.format(data='"a.jsonl"', eval_data="", device='"cpu"', max_length=32))


def train(round: SiteRound, words: list[str], held: int, ended: Callable[[], bool]) -> None:
    """In place of a training: an update of zeros, signed by the site."""
    site = round.site
    sign_folder(send(Path(words[0]), round.folder / "update"), Party(site.private_key, site.home / "site.pub"))


def carry(source: Path) -> Callable[[Parts, Path], int]:
    """Fetch from a file, as it is now, in pieces."""

    def fetch(part: Part, writer: PartWriter) -> None:
        data = source.read_bytes()[part.start : part.start + part.length]
        for start in range(0, len(data), 1000):
            writer.write(data[start : start + 1000])

    return lambda parts, target: fetch_file(parts, target, fetch)


def answer(round: SiteRound, fetch: Callable[[Parts, Path], int]) -> Parts:
    """What a site does with an order."""
    with round.alone(lambda: False) as held:
        return round.answer(fetch, held, lambda: False)


@dataclass
class Carrier:
    """In place of FLARE and the owner's session: a job runs in this process when it is submitted.

    Args:
        sites: by client. jobs: their states. names: of the jobs. problems: what the sites answered in place of an
            update. slow: jobs begin, and do not end.
    """

    sites: dict[str, Site]
    jobs: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    slow: bool = False

    def __call__(self, kit: Path) -> Carrier:
        return self

    def submit(self, job: Path) -> str:
        (workflow,) = json.loads((job / "app_server/config/config_fed_server.json").read_text())["workflows"]
        told, number = workflow["args"], str(len(self.jobs))
        self.names[number] = json.loads((job / "meta.json").read_text())["name"]
        self.jobs[number] = "RUNNING" if self.slow else "FINISHED:EXECUTION_EXCEPTION"
        if self.slow:
            return number
        try:
            with contextlib.chdir("/"):  # as FLARE's processes, which work in folders of their own
                round = SiteRound.of(self.sites[told["client"]], told["order"])
                parts = answer(round, carry(Path(told["proxy"])))
                carry(round.sealed_update)(parts, Path(told["update"]))
            self.jobs[number] = "FINISHED:COMPLETED"
        except (FedqsnError, NoUpdate) as error:
            self.problems.append(str(error))
        return number

    def status(self, job: str) -> str:
        return self.jobs[job]

    def unfinished(self, name: str) -> list[str]:
        """Jobs that were begun, and not ended."""
        return [job for job, state in self.jobs.items() if state == "RUNNING" and self.names[job] == name]

    def abort(self, job: str) -> None:
        """End a job that was begun."""
        self.jobs[job] = "FINISHED:ABORTED"

    def at_work(self) -> dict[str, set[str]]:
        return {}

    def close(self) -> None:
        """Nothing is held."""


@dataclass
class Clock:
    """In place of the module `time` for who waits for updates: a day passes after some looks at what has come.

    So all that can come comes in time, on a busy machine too, and nothing is waited for.
    """

    looks: int = 10
    now: float = field(default_factory=time.monotonic)

    def monotonic(self) -> float:
        return self.now + (86_400 if self.looks < 0 else 0)

    def sleep(self, seconds: float) -> None:
        self.looks -= 1


def copied_host(desk: Desk, place: Path) -> Host:
    """The host's folder on another machine."""
    shutil.copytree(desk.owner.host.home, place)
    return Host(place)


def forked_nvflare(*words: str) -> None:
    """FLARE's tool in a forked process, which need not import it again. Raises InputError: it failed."""
    from nvflare import cli

    child = os.fork()
    if not child:
        code = 1
        try:
            with tempfile.TemporaryDirectory() as home, open(os.devnull, "w") as nothing:
                os.environ["HOME"], sys.argv = home, ["nvflare", *words]
                os.dup2(nothing.fileno(), 1)
                os.dup2(nothing.fileno(), 2)
                cli.main()
                code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if status:
        raise InputError("failed", where=f"nvflare {' '.join(words[:2])}")
