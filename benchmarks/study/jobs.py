"""A whole federated job by the product's own functions, as its users would play it.

owner ─mask─▶ server ─export_proxy─▶ proxies ─client_train─▶ updates ─merge─▶ server ─ ... ─restore─▶ final
                           └─audit (round 1, all clients together)
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.study.attack import audited
from benchmarks.study.settings import START, Cell, Method
from benchmarks.study.training import MANY, rate
from benchmarks.study.worlds import World

OWNER = "owner"  # the client id of the owner's own control


@dataclass
class Clock:
    """Seconds of each part of a cell."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - began, 1)


@dataclass
class Job:
    """One job and what was measured of it so far."""

    cell: Cell
    place: World
    folder: Path
    floor: Mapping[int, float]  # losses of the public base with so many public examples
    clock: Clock = field(default_factory=Clock)
    never_sent: float = 0.0
    share: float = 1.0  # of all parameters that one client trains
    bytes_down: int = 0
    bytes_up: int = 0

    @property
    def method(self) -> Method:
        return self.cell.method

    @property
    def key(self) -> Path:
        return self.folder / "job.key"

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger.jsonl"

    def hiding(self) -> dict[str, Any]:
        """Options that `mask` and `export_proxy` share."""
        method = self.method
        more = {"public_base": str(self.place.base)} if method.fill == "base" else {}
        if method.layers is not None:
            more["layers"] = method.layers
        if method.preset is not None:
            return {"preset": method.preset, "schedule": method.schedule, **more}
        return {"fill": method.fill, "where": method.where, "schedule": method.schedule, **more}

    def mask(self) -> Path:
        """The server model. The key is drawn from the seed, so that the study can be repeated."""
        from fedqsn_cli import mask
        from fedqsn_cli.masks import job_key

        drawn, options = self.folder / "drawn.key", self.hiding()
        mask(str(self.place.owner), self.folder / "drawn", key=drawn, p1=self.method.p1, **options)
        seed = hashlib.sha256(f"{self.cell.name}".encode()).digest()
        job_key.save(self.key, replace(job_key.load(drawn), key=seed))
        shutil.rmtree(self.folder / "drawn")
        return self.mask_with_key(self.place.owner, self.folder / "server-0")

    def mask_with_key(self, model: Path, server: Path) -> Path:
        """The server model of any model, with the job's key."""
        from fedqsn_cli import mask

        self.never_sent = mask(str(model), server, key=self.key, p1=self.method.p1, **self.hiding()).hidden
        return server

    def export(self, server: Path, number: int, clients: Sequence[str] | None = None, p2: float | None = None) -> Path:
        """Proxies of one round; returns the folder that they are in."""
        from fedqsn_cli import export_proxy

        method, out = self.method, self.folder / f"proxies-{number}"
        made = export_proxy(
            str(server),
            str(out / "{client}"),
            client=clients or self.place.clients,
            round=number,
            key=self.key,
            ledger=self.ledger,
            p2=method.p2 if p2 is None else p2,
            format=method.number_format,
            train=method.train,
            **self.hiding(),
        )
        if clients is None:
            self.bytes_down += sum(proxy.bytes for proxy in made.proxies)
            self.share = 1.0 if method.train == "all" else 1.0 - made.hidden_from_client
        return out

    def train(self, proxy: Path, update: Path, data: str, seed: int) -> Path:
        """What one client does."""
        from fedqsn_cli import client_train

        task = self.place.task
        client_train(
            proxy,
            update,
            data=self.place.data(data),
            epochs=MANY,
            max_steps=task.round_steps,
            seed=seed,
            lr=rate(task, self.share),
            batch_size=task.batch_size,
            max_length=task.max_length,
            device="cpu",
        )
        return update

    def merge(self, server: Path, number: int) -> Path:
        """All clients train, and their updates go into the server model."""
        from fedqsn_cli import merge

        proxies, updates = self.folder / f"proxies-{number}", self.folder / f"updates-{number}"
        updates.mkdir()
        seed = 1000 * self.cell.seed + 10 * number
        with self.clock.part("train"):
            back = [
                self.train(proxies / name, updates / name, name, seed + index)
                for index, name in enumerate(self.place.clients)
            ]
        self.bytes_up += sum(folder_bytes(folder) for folder in back)
        control = self._control(server, number, seed) if self.method.control else None
        out = self.folder / f"server-{number}"
        with self.clock.part("merge"):
            merge(str(server), back, out, key=self.key, ledger=self.ledger, control=control)
        for folder in (proxies, updates, server):
            shutil.rmtree(folder)
        return out

    def _control(self, server: Path, number: int, seed: int) -> Path:
        """The owner trains along, on his own data and a proxy without client mask."""
        proxies = self.export(server, number, clients=[OWNER], p2=0.0)
        proxy = proxies / OWNER if (proxies / OWNER).is_dir() else proxies
        with self.clock.part("train"):
            return self.train(proxy, self.folder / f"updates-{number}" / OWNER, "owner", seed + 9)

    def restore(self, server: Path, blend: float | None) -> tuple[Path, Any]:
        """The final model; `blend` None looks for the best one on the owner's development data."""
        from fedqsn_cli import merge

        task, out = self.place.task, self.folder / f"final-{'auto' if blend is None else blend}"
        chosen: dict[str, Any] = {"blend": 1.0 if blend is None else blend}
        if blend is None and self.method.hides:
            chosen = {
                "blend": "auto",
                "eval_data": self.place.data("dev"),
                "max_length": task.max_length,
                "device": "cpu",
            }
        if self.method.train == "all":
            chosen["public_base"] = str(self.place.base)
        with self.clock.part("restore"):
            made = merge(str(self.place.owner), [], out, key=self.key, restore=str(server), **chosen)
        return out, made

    def consolidate(self, server: Path, weight: float) -> Path:
        """The final model by consolidation. A language model writes its transfer texts; a classifier has titles."""
        from fedqsn_cli import consolidate

        task, out = self.place.task, self.folder / f"consolidated-{weight:g}"
        texts: dict[str, Any] = {"transfer_data": self.place.data("transfer")}
        if task.kind == "language model":
            texts = dict(zip(("written_examples", "written_length"), task.written, strict=True))
        if self.method.train == "all":
            texts["public_base"] = str(self.place.base)
        with self.clock.part("consolidate"):
            consolidate(
                str(self.place.owner),
                str(server),
                out,
                key=self.key,
                own_data=self.place.data("owner"),
                blend=START if self.method.hides else 1.0,
                transfer_weight=weight,
                steps=task.consolidate_steps,
                lr=task.consolidate_lr,
                batch_size=task.consolidate_batch,
                max_length=task.max_length,
                device="cpu",
                seed=self.cell.seed,
                **texts,
            )
        return out

    def trained(self) -> Path:
        """The server model after all rounds."""
        server = self.mask()
        for number in range(1, self.place.task.rounds + 1):
            self.export(server, number)
            server = self.merge(server, number)
        return server


def play(cell: Cell, place: World, folder: Path, floor: Mapping[int, float]) -> dict[str, Any]:
    """The whole job: what the clients' training made of the owner's model, and what the first proxies gave away."""
    job = Job(cell, place, folder, floor)
    with job.clock.part("owner"):
        server = job.mask()
    result: dict[str, Any] = {}
    for number in range(1, place.task.rounds + 1):
        with job.clock.part("owner"):
            proxies = job.export(server, number)
        if number == 1:
            result = released(job, proxies)
        server = job.merge(server, number)
    final, made = job.restore(server, None)
    result |= {"final": place.scores(final), "blend": made.blend, "rate": rate(place.task, job.share)}
    if made.search is not None:
        result["search"] = [{"blend": one.value, "loss": one.loss} for one in made.search.curve]
    result["blends"] = [blended(job, server, blend) for blend in cell.blends]
    return result | {
        "never_sent": job.never_sent,
        "bytes_down": job.bytes_down,
        "bytes_up": job.bytes_up,
        "parts": job.clock.seconds,
    }


def released(job: Job, proxies: Path) -> dict[str, Any]:
    """How good the first client's proxy is as it was sent, and the best attack on all of them."""
    place = job.place
    folders = [proxies / name for name in place.clients]
    if not job.method.sends:  # the first proxies are the public base: what it gives away was measured with the base
        return {"release": place.scores(folders[0])}
    with job.clock.part("audit"):
        attack = audited(place, job.key, job.ledger, folders, job.cell.sizes, job.floor)
    return {"release": place.scores(folders[0]), **attack}


def curve(cell: Cell, place: World, folder: Path, floor: Mapping[int, float]) -> dict[str, Any]:
    """The attack alone."""
    job = Job(cell, place, folder, floor)
    proxies = job.export(job.mask(), 1)
    return released(job, proxies) | {"parts": job.clock.seconds}


def endings(cell: Cell, place: World, folder: Path, floor: Mapping[int, float]) -> dict[str, Any]:
    """The job without an attack, restored with every blend of the cell, and consolidated with every weight."""
    job = Job(cell, place, folder, floor)
    server = job.trained()
    return {
        "blends": [blended(job, server, blend) for blend in cell.blends],
        "consolidated": [consolidated(job, server, weight) for weight in cell.weights],
        "parts": job.clock.seconds,
    }


def blended(job: Job, server: Path, blend: float) -> dict[str, Any]:
    """How good the model is with a blend."""
    return {"blend": blend, **_scored(job, job.restore(server, blend)[0])}


def consolidated(job: Job, server: Path, weight: float) -> dict[str, Any]:
    """How good the model is when it is consolidated with a weight."""
    return {"weight": weight, **_scored(job, job.consolidate(server, weight))}


def _scored(job: Job, final: Path) -> dict[str, Any]:
    """Scores of a model that is not needed any more."""
    scores = job.place.scores(final)
    shutil.rmtree(final)
    return scores


def folder_bytes(folder: Path) -> int:
    """Bytes of all files right in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
