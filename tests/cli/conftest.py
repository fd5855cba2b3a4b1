"""One small federated round, played through the commands, for all tests of what they print."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.families import build
from support.processes import Outcome, run


@dataclass(frozen=True)
class Round:
    """The folder that a round was played in, and how each command ended."""

    folder: Path
    outcomes: dict[str, Outcome]

    def json(self, command: str) -> dict[str, object]:
        return dict(json.loads(self.outcomes[command].out))


@pytest.fixture(scope="session")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Round]:
    folder = tmp_path_factory.mktemp("round")
    build("bert", folder / "global", tokenizer=True)
    lines = [json.dumps({"text": f"w{3 + n % 7} w{20 + n % 5}", "label": n % 5}) for n in range(12)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    key, ledger = ("--key", folder / "job.key"), ("--ledger", folder / "ledger.jsonl")
    server, data = folder / "server", folder / "train.jsonl"
    yield Round(
        folder,
        {
            "mask": run("mask", folder / "global", "--out", server, "--p1", "0.25", *key, "--json"),
            "quantize": run("quantize", server, "--out", folder / "server-nf4", "--format", "nf4", "--json"),
            "export-proxy": run(
                "export-proxy",
                server,
                "--out",
                folder / "{client}",
                "--client",
                "alice",
                "--client",
                "bob",
                "--round",
                "1",
                "--p2",
                "0.25",
                *key,
                *ledger,
                "--json",
            ),
            "client-train": run(
                "client-train",
                folder / "alice",
                "--out",
                folder / "update",
                "--data",
                data,
                "--eval-data",
                data,
                "--device",
                "cpu",
                "--json",
            ),
            "merge": run(
                "merge", folder / "global", folder / "update", "--out", folder / "next", *key, *ledger, "--json"
            ),
            "evaluate": run("evaluate", folder / "next", "--data", data, "--device", "cpu", "--json"),
        },
    )
