"""How long it takes to tell what a thousand clients have seen after a hundred rounds of a job on a model like MiniLM.

Prints a JSON list of seconds. Kernels are warm.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from typing import Literal

from fedqsn_cli.exposure.exposure import exposure
from fedqsn_cli.masks.job_key import JobKey

CLIENTS, ROUNDS, LAYERS, WIDTH, VOCABULARY, POSITIONS = 1000, 100, 6, 384, 30522, 512


@dataclass(frozen=True)
class Release:
    """What decides one client's mask in one round."""

    client: str
    round: int
    schedule: Literal["fresh", "sticky"] = "fresh"
    p2: float = 0.1


def job() -> JobKey:
    """Groups of a BERT of six layers."""
    groups = {f"embeddings.{rows}": (WIDTH, WIDTH * rows) for rows in (VOCABULARY, POSITIONS)}
    for layer in range(LAYERS):
        groups |= {f"{layer}.attention.{name}": (WIDTH, WIDTH * (WIDTH + 1)) for name in "qkvo"}
        groups[f"{layer}.up"] = (4 * WIDTH, 4 * WIDTH * (WIDTH + 1))
        groups[f"{layer}.down"] = (WIDTH, WIDTH * (4 * WIDTH + 1))
    return JobKey(bytes(range(32)), 0.1, "neuron", "0" * 64, {}, groups, 20_000)


def main(runs: int) -> list[float]:
    """Seconds of each run."""
    exposure(job(), [Release("a", 1), Release("b", 1)])
    releases = [Release(f"c{client}", number) for number in range(ROUNDS) for client in range(CLIENTS)]
    seconds = []
    for _ in range(runs):
        begin = time.perf_counter()
        exposure(job(), releases)
        seconds.append(time.perf_counter() - begin)
    return seconds


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
