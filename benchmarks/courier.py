"""The courier's way down and up: `python -m benchmarks --courier`.

A sealed file goes to a site and another one of its size comes back, by FLARE with real processes and mutual TLS.
Nothing is trained: the site has its answer already. Next to it: `cp` and SHA-256 of the same bytes on the same disk,
the least that a verified transfer does. The peak of every process is its own high-water mark (VmHWM).
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
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedqsn_cli import courier_init, courier_stop, keygen
from fedqsn_cli.courier.layout import Owner, Site
from fedqsn_cli.courier.parts import Offer
from fedqsn_cli.courier.rounds import Unreachable
from fedqsn_cli.courier.work import SiteRound

GIB = 1 << 30
SIZES = (0.3, 3.0, 10.0)
MOST_TIMES, MOST_PEAK = 3.0, 600  # of cp and SHA-256; MiB
PORT = 28477
CLIENT = "alice"


@dataclass
class Transfer:
    """One size: seconds of the courier and of cp with SHA-256, both ways; peaks in MiB by process."""

    gib: float
    courier: float
    copied: float
    peaks: dict[str, int] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        return self.courier / self.copied

    def row(self) -> str:
        peak = ", ".join(f"{name} {size}" for name, size in sorted(self.peaks.items()))
        return f"| {self.gib:g} | {self.courier:.1f} | {self.copied:.1f} | {self.ratio:.2f}x | {peak} |"


def random_file(path: Path, size: int) -> Path:
    """A file of random bytes, which nothing compresses."""
    block = os.urandom(1 << 24)
    with path.open("wb") as file:
        for start in range(0, size, len(block)):
            file.write(block[: min(len(block), size - start)])
            block = block[1:] + block[:1]
    return path


def copied(source: Path, target: Path) -> float:
    """Seconds for copying a file and hashing the copy."""
    begin = time.perf_counter()
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        hashlib.file_digest(file, "sha256")
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begin
    target.unlink()
    return seconds


def peaks(home: Path) -> dict[str, int]:
    """High-water marks of the processes of a courier, in MiB."""
    found: dict[str, int] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            status = (process / "status").read_text()
        except OSError:
            continue
        module = next((word.decode() for word in words if word.startswith(b"nvflare.private")), None)
        if module is None or not any(str(home).encode() in word for word in words) or "VmHWM" not in status:
            continue
        name = module.rsplit(".", 1)[-1]
        found[name] = max(found.get(name, 0), int(status.split("VmHWM:")[1].split()[0]) >> 10)
    return found


@contextmanager
def running(home: Path) -> Iterator[Owner]:
    """A courier with one site."""
    keygen(home / "owner.key")
    courier_init(home / "courier", key=home / "owner.pub", server=f"localhost:{PORT}", local=[CLIENT])
    words = [sys.executable, "-m", "fedqsn_cli", "courier", "serve", str(home / "courier"), "--quiet"]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    try:
        yield Owner(home / "courier")
    finally:
        courier_stop(home / "courier")
        server.wait()


def transfer(owner: Owner, gib: float) -> Transfer:
    """Send one file down and one up."""
    from fedqsn_cli.courier.flare.job import write_job
    from fedqsn_cli.courier.flare.session import Session

    size, carried = int(gib * GIB), owner.carried / "file"
    proxy, update = random_file(carried.with_suffix(".proxy"), size), carried.with_suffix(".update")
    round = SiteRound.of(Site(owner.home / "sites" / CLIENT), Offer.of(proxy, lambda path, part: ""))
    shutil.copyfile(proxy, round.sealed_update)  # its answer
    baseline = sum(copied(proxy, carried.with_suffix(".copy")) for _ in range(2))
    session, high = Session(owner.admin), {}
    with tempfile.TemporaryDirectory() as place:
        job = write_job(Path(place) / "job", CLIENT, proxy, update, "")
        while True:
            try:
                session.submit(job)
                break
            except Unreachable:
                time.sleep(1)
    begin: float | None = None
    while not update.exists():
        time.sleep(0.1)
        begin = begin or (time.perf_counter() if list(round.folder.glob("proxy.sealed*")) else None)
        high = {name: max(size, high.get(name, 0)) for name, size in {**high, **peaks(owner.home)}.items()}
    seconds = time.perf_counter() - (begin or time.perf_counter())
    session.close()
    assert update.stat().st_size == size
    for path in (proxy, update):
        path.unlink()
    shutil.rmtree(round.folder)
    return Transfer(gib, seconds, baseline, high)


def main(work: Path, out: Path | None, sizes: Sequence[float] = SIZES) -> int:
    """Measure and print. Returns 0."""
    results: list[dict[str, Any]] = []
    print("| GiB each way | courier, s | cp and SHA-256, s | ratio | peak, MiB |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(dir=work) as name, running(Path(name)) as owner:
        for gib in sizes:
            if shutil.disk_usage(work).free < 5 * gib * GIB:
                print(f"| {gib:g} | skipped: the disk has no room for five such files | | | |")
                continue
            made = transfer(owner, gib)
            print(made.row(), flush=True)
            reached = made.ratio <= MOST_TIMES and max(made.peaks.values()) <= MOST_PEAK
            results.append({**made.__dict__, "ratio": made.ratio, "reached": reached})
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")
    return 0
