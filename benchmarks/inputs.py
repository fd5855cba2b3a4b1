"""What the figures run on: models, a job with its key and ledger, updates. Made once, in processes of their own."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import Failed, run
from benchmarks.synthetic import SHAPES

SPARE = 2 << 30  # bytes that stay free on the disk
P1, P2 = "0.1", "0.1"


class NoRoom(Exception):
    """The disk is too small for a figure."""


@dataclass
class Place:
    """A folder to work in, the interpreter that has fedqsn, and how often everything is measured.

    Args:
        update_format: precision of the updates that are merged, fp32 or bf16.
        clients: numbers of clients for the fan-out. updates: how many updates a merge takes.
        millions: parameters that a kernel quantizes, in 2^20. load: share of the full load that `load` measures.
    """

    work: Path
    runs: int = 3
    python: str = sys.executable
    update_format: str = "bf16"
    clients: Sequence[int] = (1, 10, 100)
    updates: int = 8
    millions: float = 64
    load: float = 1.0

    def module(self, *arguments: object) -> list[str]:
        """A command that runs a module of this package."""
        return [self.python, "-m", *map(str, arguments)]

    def fedqsn(self, *arguments: object) -> list[str]:
        """A fedqsn command, start-up included."""
        return [self.python, "-m", "fedqsn_cli", *map(str, arguments), "--quiet"]

    def need(self, size: float) -> None:
        """Raises NoRoom if the disk has not so many bytes, and some to spare."""
        free = shutil.disk_usage(self.work).free
        if free < size + SPARE:
            raise NoRoom(f"needs {size / 1e9:.0f} GB, the disk has {free / 1e9:.0f} GB free")

    def clear(self, *names: str) -> None:
        """Delete outputs."""
        for name in names:
            path = self.work / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def model(self, size: str, copy: int = 0) -> Path:
        """A synthetic model; other copies have other weights."""
        folder = self.work / f"model-{size}{f'-{copy}' if copy else ''}"
        if not folder.exists():
            self.need(2 * SHAPES[size].parameters)
            staging = folder.with_suffix(".part")
            shutil.rmtree(staging, ignore_errors=True)
            run(self.module("benchmarks.synthetic", size, staging, 100 * copy))
            os.sync()
            staging.rename(folder)
        return folder

    def training(self, kind: str) -> Path:
        """A folder with model/, data.jsonl, and proxy/, a dense proxy in which a fifth is hidden twice."""
        folder = self.work / f"training-{kind}"
        if not folder.exists():
            staging = folder.with_suffix(".part")
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            run(self.module("benchmarks.training", "make", kind, staging))
            secrets = ["--key", staging / "job.key", "--ledger", staging / "ledger.jsonl"]
            hiding = ["--p1", 0.2, "--p2", 0.2, "--format", "none", "--client", "a", "--round", 1]
            run(self.fedqsn("export-proxy", staging / "model", "--out", staging / "proxy", *hiding, *secrets))
            staging.rename(folder)
        return folder

    def adapters(self, size: str) -> Path:
        """A folder with model/, data.jsonl, and proxy/, a packed nf4 proxy."""
        folder = self.work / f"adapters-{size}"
        if not folder.exists():
            self.need(3 * SHAPES[size].parameters)
            staging = folder.with_suffix(".part")
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            run(self.module("benchmarks.lora", "make", size, staging))
            secrets = ["--key", staging / "job.key", "--ledger", staging / "ledger.jsonl"]
            hiding = ["--p1", P1, "--p2", P2, "--client", "a", "--round", 1]
            run(self.fedqsn("export-proxy", staging / "model", "--out", staging / "proxy", *hiding, *secrets))
            staging.rename(folder)
        return folder

    def audited(self, size: str) -> Job:
        """A job whose only client's proxy is kept."""
        job = Job(self.model(size), self.work / f"job-{size}-audited")
        if not job.proxy.exists():
            self.need(SHAPES[size].parameters)
            self.clear(job.folder.name)
            job.folder.mkdir()
            name = job.folder.name
            run(self.export(size, f"{name}/proxy", ["a"], f"{name}/job.key", f"{name}/ledger.jsonl"))
            os.sync()
        return job

    def adapter_job(self, size: str, updates: int) -> Job:
        """A job with so many clients' updates of adapters."""
        name = f"job-{size}-{updates}-lora"
        job = Job(self.work / f"model-{size}", self.work / name)
        if not (job.folder / "done").exists():
            self.clear(name)
            job.folder.mkdir()
            self._release(size, name, updates)
            run(self.module("benchmarks.lora", "updates", job.model, job.key, job.ledger, job.folder / "updates"))
            os.sync()
            (job.folder / "done").touch()
        return job

    def _release(self, size: str, name: str, clients: int, *ratios: str) -> None:
        """Make and record the proxies of a job, and delete them."""
        for client in range(clients):
            made = f"{name}/proxy"
            run(self.export(size, made, [f"c{client}"], f"{name}/job.key", f"{name}/ledger.jsonl", *ratios))
            self.clear(made)

    def export(self, size: str, out: str, clients: Sequence[str], key: str, ledger: str, *more: str) -> list[str]:
        """A fedqsn export-proxy command for these clients."""
        named = [word for client in clients for word in ("--client", client)]
        given = ("--p1", P1, "--p2", P2) if "--p1" not in more else ()
        return self.fedqsn(
            "export-proxy",
            self.work / f"model-{size}",
            "--out",
            self.work / out,
            *named,
            "--round",
            1,
            "--key",
            self.work / key,
            "--ledger",
            self.work / ledger,
            *given,
            *more,
        )

    def job(self, size: str, updates: int, form: str, *ratios: str) -> Job:
        """A job with so many clients' updates; the proxies themselves are made, recorded and deleted."""
        name = f"job-{size}-{updates}-{form}{'-whole' if ratios else ''}"
        job = Job(self.work / f"model-{size}", self.work / name)
        if (job.folder / "done").exists():
            return job
        self.need(SHAPES[size].parameters * (updates * (4 if form == "fp32" else 2) + 0.7))
        self.clear(name)
        job.folder.mkdir()
        self._release(size, name, updates, *ratios)
        run(self.module("benchmarks.updates", job.model, job.key, job.ledger, form, job.folder / "updates"))
        os.sync()
        (job.folder / "done").touch()
        return job

    def merge(self, job: Job, out: str, *more: object) -> list[str]:
        """A fedqsn merge command for all updates of a job."""
        secrets = ["--key", job.key, "--ledger", job.ledger]
        return self.fedqsn("merge", job.model, *job.updates, "--out", self.work / out, *secrets, *more)

    def prepare_kernels(self) -> None:
        """Run every command once on a tiny model, so that compiled kernels are on disk and programs in memory."""
        self.model("tiny")
        job = self.job("tiny", 2, self.update_format)
        self.clear("warm")
        run(self.merge(job, "warm"))
        self.clear("warm")


@dataclass(frozen=True)
class Job:
    """A model, and a folder with key, ledger and updates."""

    model: Path
    folder: Path

    @property
    def key(self) -> Path:
        return self.folder / "job.key"

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger.jsonl"

    @property
    def proxy(self) -> Path:
        return self.folder / "proxy"

    @property
    def updates(self) -> list[Path]:
        return sorted((self.folder / "updates").iterdir())


__all__ = ["Failed", "Job", "NoRoom", "Place"]
