"""The courier's way down and up: `python -m benchmarks --courier`.

A sealed proxy goes to a site, is opened and verified there, and an update of its size is sealed and comes back, by
FLARE with real processes and mutual TLS. Nothing is trained: the update lies there already. Down and up are timed, and
what the site does in between (open, verify, seal) apart. Next to them: `cp` and SHA-256 of the same bytes on the same
disk, the least that a verified transfer does. The peak of every process is its own high-water mark (VmHWM). Processor
seconds are user and system time, of each process within each of the three steps: what they took to start is not in it.

With `--sites N`: so many sites on this machine, each with a proxy of 1 MiB, all at once; and what all processes hold
together at the worst instant (proportional set sizes: shared pages count once).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedqsn_cli import courier_init, courier_stop, keygen
from fedqsn_cli.artifacts.manifests import PROXY_MANIFEST, SIGNATURE, UPDATE_MANIFEST, file_digest
from fedqsn_cli.checkpoint.files import remove_tree, stream_new_file
from fedqsn_cli.courier.layout import Owner, Site
from fedqsn_cli.courier.orders import Order
from fedqsn_cli.courier.outbox import Consignment
from fedqsn_cli.courier.parts import PartDigests, Parts
from fedqsn_cli.courier.rounds import Unreachable
from fedqsn_cli.courier.work import SiteRound
from fedqsn_cli.crypto.keys import load_recipient, load_signing_key
from fedqsn_cli.crypto.seal import sealed_pieces
from fedqsn_cli.crypto.signature import signed_bytes
from fedqsn_cli.options import ProposalOptions

if TYPE_CHECKING:
    from fedqsn_cli.courier.flare.session import Session

GIB = 1 << 30
SIZES = (0.3, 3.0, 10.0)
MOST_TIMES, MOST_PEAK = 3.0, 600  # of cp and SHA-256; MiB
PORT = 28477
CLIENT = "alice"
SMALL = 1 << 20  # bytes of each proxy where there are many sites


@dataclass
class Transfer:
    """One size: seconds down and up, between the two, and of cp with SHA-256, both ways.

    Args:
        peaks: MiB of each process. processor: CPU seconds for a GiB, by step and process.
    """

    gib: float
    courier: float
    between: float
    copied: float
    peaks: dict[str, int]
    processor: dict[str, dict[str, float]]

    @property
    def ratio(self) -> float:
        return self.courier / self.copied

    def row(self) -> str:
        peak = ", ".join(f"{name} {size}" for name, size in sorted(self.peaks.items()))
        times = f"{self.courier:.1f} | {self.between:.1f} | {self.copied:.1f} | {self.ratio:.2f}x"
        used = "; ".join(f"{step}: {_listed(seconds)}" for step, seconds in self.processor.items())
        return f"| {self.gib:g} | {times} | {peak} | {used} |"


def _listed(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {used:.1f}" for name, used in sorted(seconds.items()) if used >= 0.05)


def random_file(path: Path, size: int) -> Path:
    """A file of random bytes, which nothing compresses."""
    block = os.urandom(1 << 24)
    with path.open("wb") as file:
        for start in range(0, size, len(block)):
            file.write(block[: min(len(block), size - start)])
            block = block[1:] + block[:1]
    return path


def copied(source: Path, target: Path) -> tuple[float, float]:
    """Seconds, and processor seconds, for copying a file and hashing the copy."""
    begin, used = time.perf_counter(), time.process_time()
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        hashlib.file_digest(file, "sha256")
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begin, time.process_time() - used
    target.unlink()
    return seconds


@dataclass
class Watch:
    """High-water marks in MiB, and processor seconds, of the processes of a courier.

    Args:
        together: MiB that all of them held at the worst instant. most: how many they were then.
    """

    home: Path
    peaks: dict[str, int] = field(default_factory=dict)
    processor: dict[str, float] = field(default_factory=dict)
    together: int = 0
    most: int = 0

    def look(self) -> dict[str, float]:
        """Take down what the processes have used so far; returns their processor seconds."""
        for name, process in self._ours():
            with suppress(OSError, IndexError):  # it has ended
                status, times = (
                    (process / "status").read_text(),
                    (process / "stat").read_text().rsplit(")", 1)[1].split(),
                )
                held = int(status.split("VmHWM:")[1].split()[0]) >> 10
                self.peaks[name] = max(self.peaks.get(name, 0), held)
                self.processor[name] = (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
        return dict(self.processor)

    def look_at_shares(self) -> None:
        """Take down what all of them hold together: this walks through their pages, and slows them."""
        held = []
        for _, process in self._ours():
            with suppress(OSError):
                held.append(int((process / "smaps_rollup").read_text().split("Pss:")[1].split()[0]) >> 10)
        if sum(held) > self.together:
            self.together, self.most = sum(held), len(held)

    def _ours(self) -> Iterator[tuple[str, Path]]:
        """The processes of this courier, by the modules that they run."""
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (process / "cmdline").read_bytes().split(b"\0")
                module = next((word.decode() for word in words if word.startswith(b"nvflare.private")), None)
                if module is not None and any(bytes(self.home) in word for word in words):
                    yield module.rsplit(".", 1)[-1], process


@contextmanager
def running(home: Path, clients: Sequence[str] = (CLIENT,)) -> Iterator[Owner]:
    """A courier with its sites."""
    keygen(home / "owner.key")
    courier_init(home / "courier", key=home / "owner.pub", server=f"localhost:{PORT}", local=clients)
    for client in clients:
        (home / "courier/sites" / client / f"{client}.jsonl").touch()
    words = [sys.executable, "-m", "fedqsn_cli", "courier", "serve", str(home / "courier"), "--quiet"]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    try:
        yield Owner(home / "courier")
    finally:
        courier_stop(home / "courier")
        server.wait()


def signed_folder(folder: Path, manifest: str, size: int, key: Path) -> Path:
    """A folder with a manifest, random bytes, and a signature."""
    folder.mkdir()
    (folder / manifest).write_text("{}")
    random_file(folder / "random.safetensors", size)
    digests = {path.name: file_digest(path) for path in folder.iterdir()}
    (folder / SIGNATURE).write_bytes(signed_bytes(digests, load_signing_key(key)))
    return folder


def consignment(owner: Owner, size: int, client: str = CLIENT) -> Consignment:
    """A proxy of random bytes, sealed and ordered."""
    key = owner.home.with_name("owner.key")
    folder = signed_folder(owner.home / "proxy", PROXY_MANIFEST, size, key)
    sealed, parts = owner.home / f"{client}.proxy", PartDigests()
    stream_new_file(sealed, parts.through(sealed_pieces(folder, load_recipient(owner.public_key(client)))))
    digest = file_digest(folder / PROXY_MANIFEST)
    shutil.rmtree(folder)
    order = Order(client, digest, "0" * 64, Parts(parts.finish()), ProposalOptions())
    return Consignment(order, order.signed(load_signing_key(key)), sealed)


def answered(owner: Owner, sent: Consignment, size: int) -> SiteRound:
    """The round of a site, whose update lies there already."""
    site = Site(owner.home / "sites" / sent.order.client)
    round = SiteRound.of(site, sent.text)
    signed_folder(round.folder / "update", UPDATE_MANIFEST, size, site.private_key)
    return round


def submit(session: Session, sent: Consignment, update: Path) -> None:
    """Send a job, as soon as the server answers."""
    from fedqsn_cli.courier.flare.job import write_job

    with tempfile.TemporaryDirectory() as place:
        job = write_job(Path(place) / "job", sent, update)
        while True:
            try:
                session.submit(job)
                return
            except Unreachable:
                time.sleep(1)


def transfer(owner: Owner, gib: float) -> Transfer:
    """Send one file down and one up."""
    from fedqsn_cli.courier.flare.session import Session

    size, update = int(gib * GIB), owner.host.carried / "file.update"
    sent = consignment(owner, size)
    round = answered(owner, sent, size)
    copies = [copied(sent.sealed, owner.home / "copy") for _ in range(2)]
    session, watch = Session(owner.host.admin), Watch(owner.home)
    seen, used = dict[str, float](), dict[str, dict[str, float]]()
    submit(session, sent, update)
    events = {
        "down": round.folder / "proxy.sealed.part",
        "opened": round.sealed_proxy,
        "up": round.sealed_update,
    }
    while not update.exists():
        time.sleep(0.05)
        for name, path in events.items():
            if name not in seen and path.exists():
                seen[name], used[name] = time.perf_counter(), watch.look()
        watch.look()
    seen["end"], used["end"] = time.perf_counter(), watch.look()
    session.close()
    for path in (sent.sealed, update):
        path.unlink()
    for path in (round.folder, round.folder.with_name(round.folder.name + ".answered")):
        remove_tree(path)
    times = list(seen.values())
    down, between, up = (after - before for before, after in pairwise(times))
    processor = {
        name: {one: (seconds - used[before].get(one, 0.0)) / gib for one, seconds in used[after].items()}
        for name, (before, after) in zip(("down", "between", "up"), pairwise(used), strict=True)
    }
    processor["cp"] = {"one process": sum(cpu for _, cpu in copies) / 2 / gib}
    return Transfer(gib, down + up, between, sum(taken for taken, _ in copies), watch.peaks, processor)


def many_sites(work: Path, count: int) -> int:
    """Send a small proxy to each of many sites, all at once, and print seconds and memory. Returns 0."""
    from fedqsn_cli.courier.flare.session import Session

    clients = [f"site-{number:02}" for number in range(count)]
    with tempfile.TemporaryDirectory(dir=work) as name, running(Path(name), clients) as owner:
        session, watch = Session(owner.host.admin), Watch(owner.home)
        updates = {client: owner.host.carried / f"{client}.update" for client in clients}
        begin = time.perf_counter()
        for client, update in updates.items():
            sent = consignment(owner, SMALL, client)
            answered(owner, sent, SMALL)
            submit(session, sent, update)
        while not all(update.exists() for update in updates.values()):
            time.sleep(0.5)
            watch.look()
            watch.look_at_shares()
        seconds = time.perf_counter() - begin
        session.close()
    peaks = ", ".join(f"{kind} {size}" for kind, size in sorted(watch.peaks.items()))
    print(f"{count} sites: {seconds:.0f} s; {watch.most} processes held {watch.together} MiB; peaks, MiB: {peaks}")
    return 0


def main(work: Path, out: Path | None, sizes: Sequence[float] = SIZES) -> int:
    """Measure and print. Returns 0."""
    results: list[dict[str, Any]] = []
    columns = (
        "GiB each way",
        "courier, s",
        "open and seal, s",
        "cp and SHA-256, s",
        "ratio",
        "peak, MiB",
        "CPU, s/GiB",
    )
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    with tempfile.TemporaryDirectory(dir=work) as name, running(Path(name)) as owner:
        for gib in sizes:
            if shutil.disk_usage(work).free < 6 * gib * GIB:
                print(f"| {gib:g} | skipped: the disk has no room for six such files | | | | | |")
                continue
            made = transfer(owner, gib)
            print(made.row(), flush=True)
            reached = made.ratio <= MOST_TIMES and max(made.peaks.values()) <= MOST_PEAK
            results.append({**made.__dict__, "ratio": made.ratio, "reached": reached})
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")
    return 0
