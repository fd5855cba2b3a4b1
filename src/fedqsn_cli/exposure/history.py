"""The releases of a job, client by client, and how many of their masks can be drawn again in a few seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.masks.draw import LABEL, client_scope, derive
from fedqsn_cli.masks.job_key import JobKey

Ints = NDArray[np.int64]

SEED_RANKS = 350  # a seed costs as much time as so many ranks


class AnyRelease(Protocol):
    """What decides a client's mask: a line of the ledger, or a release that is only planned."""

    @property
    def client(self) -> str:
        """Who got the proxy."""

    @property
    def round(self) -> int:
        """In which round."""

    @property
    def schedule(self) -> Literal["fresh", "sticky"]:
        """How its mask was drawn."""

    @property
    def p2(self) -> float:
        """Ratio hidden from this client."""


@dataclass(frozen=True)
class History:
    """The ledger by client.

    Args:
        lines: client -> its releases, by number. scopes: of each release's mask. ratios: p2 of each release.
        again: a release whose mask its client has had before.
    """

    lines: dict[str, list[int]]
    scopes: list[tuple[str, ...]]
    ratios: list[float]
    again: list[bool]

    @classmethod
    def of(cls, releases: Sequence[AnyRelease]) -> History:
        """From releases in the order of the ledger."""
        lines: dict[str, list[int]] = {}
        scopes, ratios, again = [], [], []
        known: set[tuple[tuple[str, ...], float]] = set()
        for number, release in enumerate(releases):
            scope = client_scope(release.client, None if release.schedule == "sticky" else release.round)
            lines.setdefault(release.client, []).append(number)
            scopes.append(scope)
            ratios.append(release.p2)
            again.append((scope, release.p2) in known)
            known.add((scope, release.p2))
        return cls(lines, scopes, ratios, again)

    def steps(self) -> Steps:
        """First every client's first release, then every second one, and so on."""
        rows = list(self.lines.values())
        pairs = [
            [(client, row[step]) for client, row in enumerate(rows) if len(row) > step]
            for step in range(max(map(len, rows), default=0))
        ]
        flat = np.array([pair for step in pairs for pair in step], np.int64).reshape(-1, 2)
        edges = np.cumsum([0, *map(len, pairs)])
        kinds, kind = np.unique(np.array(self.ratios)[flat[:, 1]], return_inverse=True)
        return Steps(flat[:, 0], flat[:, 1], edges, np.array(self.again, np.bool_)[flat[:, 1]], kinds, kind)


@dataclass(frozen=True)
class Steps:
    """Releases by step, in one array: step s is edges[s] ... edges[s + 1] - 1.

    Args:
        clients, lines: client and number of each release. again: as in the history.
        kinds, kind: the different values of p2, and which of them each release has.
    """

    clients: Ints
    lines: Ints
    edges: Ints
    again: NDArray[np.bool_]
    kinds: NDArray[np.float64]
    kind: Ints


@dataclass(frozen=True)
class Sample:
    """Which groups are looked at, and how many of their units, the first ones: ranks are as good as random."""

    units: dict[str, int]
    share: float


def sampled(job: JobKey, history: History, most_ranks: int, most_bytes: int) -> Sample:
    """All units where that is quick; else groups in an order that the key gives, until it would no longer be."""
    draws = _expected_draws(job, history)
    most_units = max(1024, most_bytes // max(len(history.lines), 1))
    units = {name: min(n, most_units) for name, (n, _) in job.groups.items() if n}
    cost = {name: draws[name] * (count + SEED_RANKS) for name, count in units.items()}
    if sum(cost.values()) > most_ranks:
        chosen: dict[str, int] = {}
        left = float(most_ranks)
        for name in sorted(units, key=lambda name: derive(job.key, (LABEL, "exposure", name))):
            if cost[name] <= left:
                chosen[name] = units[name]
                left -= cost[name]
        if not chosen:
            name = min(cost, key=lambda name: (cost[name], name))
            chosen = {name: max(64, min(units[name], int(most_ranks / draws[name]) - SEED_RANKS))}
        units = chosen
    everything = sum(n for n, _ in job.groups.values())
    return Sample(units, sum(units.values()) / everything if everything else 1.0)


def _expected_draws(job: JobKey, history: History) -> dict[str, float]:
    """Draws that each group needs, all clients together, on average: a client that has seen everything needs none."""
    fresh = [sum(not history.again[i] for i in rows) for rows in history.lines.values()]
    steps = np.arange(max(fresh, default=0))
    waiting = np.array([sum(count > step for count in fresh) for step in steps], np.float64)  # clients still drawing
    ratio = max(history.ratios, default=0.0)
    return {
        name: float((waiting * (1.0 - (1.0 - ratio**steps) ** max(units, 1))).sum())
        for name, (units, _) in job.groups.items()
    }
