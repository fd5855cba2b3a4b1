"""A small job on disk, for tests that damage one of its files: model, key, ledger, proxy, update and data."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from support.families import build
from support.processes import run
from support.training_jobs import labelled


@dataclass(frozen=True)
class World:
    """The folder of a job in its first round."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def proxy(self) -> Path:
        return self.root / "proxy"

    @property
    def update(self) -> Path:
        return self.root / "update"

    @property
    def key(self) -> Path:
        return self.root / "job.key"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.jsonl"

    @property
    def data(self) -> Path:
        return self.root / "data.jsonl"

    def copy(self, name: str, where: Path) -> Path:
        """A copy of an artifact, to be damaged."""
        return Path(shutil.copytree(self.root / name, where / f"{name}-copy"))

    def export(self, model: Path, where: Path, p1: float | None = 0.25) -> list[str | Path]:
        """The words that export a model: with a key and ledger in `where`, or those of the job if `p1` is None."""
        own = ["--key", self.key, "--ledger", self.ledger]
        new = ["--key", where / "job.key", "--ledger", where / "ledger.jsonl", "--p1", str(p1)]
        words = ["export-proxy", model, "--out", where / "proxy", "--client", "carol", "--round", "1", "--p2", "0.25"]
        return [*words, *(own if p1 is None else new)]


def make_world(root: Path, family: str = "bert") -> World:
    """Play the first round of a job with one client."""
    world = World(root)
    build(family, world.model, tokenizer=True)
    labelled(world.data)
    key = ("--key", world.key)
    steps: tuple[tuple[str | Path, ...], ...] = (
        ("mask", world.model, "--out", root / "server", "--p1", "0.25", *key),
        ("quantize", root / "server", "--out", root / "quantized", "--format", "nf4"),
        ("export-proxy", root / "quantized", "--out", world.proxy, "--client", "alice", "--round", "1")
        + ("--p2", "0.25", *key, "--ledger", world.ledger),
        ("client-train", world.proxy, "--out", world.update, "--data", world.data, "--max-steps", "1"),
    )
    for words in steps:
        ended = run(*words)
        assert ended.code == 0, ended
    return world
