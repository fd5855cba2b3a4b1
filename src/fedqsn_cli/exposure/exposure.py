"""What clients and coalitions have seen so far, from the ledger and the key alone.

A parameter is seen when a proxy showed its unit in any round, however coarsely quantized; a parameter without a unit
(norms, most biases) is seen with the first proxy. Shares are of all parameters, hidden ones included.

Every mask is drawn again, release by release; a client that has seen all that the server mask leaves of a group needs
no further draws of it. Beyond `MOST_RANKS` only a random part of the units is looked at, chosen by the key, and the
shares become estimates: `Exposure.looked_at` tells how large that part was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.exposure.coalitions import worst
from fedqsn_cli.exposure.replay import Seeds, show
from fedqsn_cli.exposure.results import ClientExposure, Exposure
from fedqsn_cli.kernels.threads import run_ranges
from fedqsn_cli.masks.draw import LABEL, SERVER, client_scope, derive, hidden_count, hidden_units, ranks
from fedqsn_cli.masks.job_key import JobKey

Ints = NDArray[np.int64]

MOST_RANKS = 600_000_000  # 64-bit ranks: some 5 seconds on two cores
MOST_BYTES = 1 << 26  # of what is kept of one group at a time, a byte a client and unit
SEED_RANKS = 350  # a seed costs as much time as so many ranks
SIZES = (2, 3, 5, 10)  # coalitions that are looked at, as far as there are so many clients
HEAT_CLIENTS = 64  # those that have seen most
LONGEST = 100  # proxies, of the analytic curve
FOREVER = 100_000  # proxies; what is not seen by then counts as never seen


class Shown(Protocol):
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


def exposure(job: JobKey, releases: Sequence[Shown], *, sizes: Iterable[int] = SIZES) -> Exposure:
    """What the clients of one job have seen.

    Args:
        releases: of this job, in order.
        sizes: of the coalitions to look for; the coalition of all clients is always among them.
    """
    history = _History.of(releases)
    sample = _sample(job, history)
    replayed = _replay(job, history, sample)
    clear, total = job.clear, _total(job)
    shares = (clear + replayed.seen) / total if total else replayed.seen
    clients = tuple(
        ClientExposure(name, tuple(releases[i].round for i in lines), tuple(float(shares[i]) for i in lines))
        for name, lines in history.lines.items()
    )
    count = len(clients)
    wanted = sorted({size for size in sizes if 2 <= size <= count} | ({count} if count > 1 else set()))
    odds = _Odds.of(job, min((release.p2 for release in releases), default=0.0))
    return Exposure(
        clients=clients,
        coalitions=worst(
            list(history.lines), replayed.bits, replayed.weights / max(total, 1), clear / max(total, 1), wanted
        ),
        proxies_to_99=odds.proxies_to(0.99) if releases else None,
        clear_share=clear / total if total else 0.0,
        hidden_share=1.0 - odds.visible / total if total else 0.0,
        heat_map=_heat(job, clients, replayed.units),
        analytic=odds.curve(max(map(len, history.lines.values()), default=0)) if releases else (),
        looked_at=sample.share,
    )


def coverage(p1: float, p2: float, proxies: int) -> float:
    """Share of units that so many fresh proxies show, on average: (1 - p1)(1 - p2^K)."""
    return (1.0 - p1) * (1.0 - p2**proxies)


def expected(job: JobKey, p2: float, proxies: int) -> float:
    """Share of all parameters that a client has seen after so many fresh proxies, on average."""
    return _Odds.of(job, p2).share(proxies)


def _total(job: JobKey) -> int:
    return job.clear + sum(size for _, size in job.groups.values())


@dataclass(frozen=True)
class _Odds:
    """What fresh proxies show on average: parameters by group, with the ratio that a proxy hides of them.

    Args:
        sizes: server-visible parameters of each group. hidden: share of them that one proxy hides.
        visible: server-visible and clear parameters together.
    """

    sizes: NDArray[np.float64]
    hidden: NDArray[np.float64]
    clear: int
    visible: float
    total: int

    @classmethod
    def of(cls, job: JobKey, p2: float) -> _Odds:
        sizes, hidden = [], []
        for name, (units, size) in job.groups.items():
            left = units - job.hides(name, units)
            sizes.append(size * left / units if units else 0.0)
            hidden.append(hidden_count(left, p2) / left if left else 0.0)
        return cls(np.array(sizes), np.array(hidden), job.clear, job.clear + sum(sizes), _total(job))

    def share(self, proxies: int) -> float:
        """Of all parameters."""
        seen = self.clear + float((self.sizes * (1.0 - self.hidden**proxies)).sum())
        return seen / self.total if self.total else 0.0

    def curve(self, longest: int) -> tuple[float, ...]:
        """The share after 1, 2, ... proxies, ten at least."""
        return tuple(self.share(proxies) for proxies in range(1, min(max(longest, 10), LONGEST) + 1))

    def proxies_to(self, part: float) -> int | None:
        """Proxies until this part of the server-visible parameters is seen, None if that takes too many."""
        least, most = 1, FOREVER
        if self.share(most) * self.total < part * self.visible:
            return None
        while least < most:
            middle = (least + most) // 2
            enough = self.share(middle) * self.total >= part * self.visible
            least, most = (least, middle) if enough else (middle + 1, most)
        return least


@dataclass(frozen=True)
class _History:
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
    def of(cls, releases: Sequence[Shown]) -> _History:
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

    def steps(self) -> _Steps:
        """First every client's first release, then every second one, and so on."""
        rows = list(self.lines.values())
        pairs = [
            [(client, row[step]) for client, row in enumerate(rows) if len(row) > step]
            for step in range(max(map(len, rows), default=0))
        ]
        flat = np.array([pair for step in pairs for pair in step], np.int64).reshape(-1, 2)
        edges = np.cumsum([0, *map(len, pairs)])
        kinds, kind = np.unique(np.array(self.ratios)[flat[:, 1]], return_inverse=True)
        return _Steps(flat[:, 0], flat[:, 1], edges, np.array(self.again, np.bool_)[flat[:, 1]], kinds, kind)


@dataclass(frozen=True)
class _Steps:
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
class _Sample:
    """Which groups are looked at, and how many of their units, the first ones: ranks are as good as random."""

    units: dict[str, int]
    share: float


def _sample(job: JobKey, history: _History) -> _Sample:
    """All units where that is quick; else groups in an order that the key gives, until it would no longer be."""
    draws = _expected_draws(job, history)
    room = max(1024, MOST_BYTES // max(len(history.lines), 1))
    units = {name: min(n, room) for name, (n, _) in job.groups.items() if n}
    cost = {name: draws[name] * (count + SEED_RANKS) for name, count in units.items()}
    if sum(cost.values()) > MOST_RANKS:
        chosen: dict[str, int] = {}
        left = float(MOST_RANKS)
        for name in sorted(units, key=lambda name: derive(job.key, (LABEL, "exposure", name))):
            if cost[name] <= left:
                chosen[name] = units[name]
                left -= cost[name]
        if not chosen:
            name = min(cost, key=lambda name: (cost[name], name))
            chosen = {name: max(64, min(units[name], int(MOST_RANKS / draws[name]) - SEED_RANKS))}
        units = chosen
    everything = sum(n for n, _ in job.groups.values())
    return _Sample(units, sum(units.values()) / everything if everything else 1.0)


def _expected_draws(job: JobKey, history: _History) -> dict[str, float]:
    """Draws that each group needs, all clients together, on average: nobody draws on who has seen everything."""
    fresh = [sum(not history.again[i] for i in rows) for rows in history.lines.values()]
    steps = np.arange(max(fresh, default=0))
    waiting = np.array([sum(count > step for count in fresh) for step in steps], np.float64)  # clients still drawing
    ratio = max(history.ratios, default=0.0)
    return {
        name: float((waiting * (1.0 - (1.0 - ratio**steps) ** max(units, 1))).sum())
        for name, (units, _) in job.groups.items()
    }


@dataclass
class _Replayed:
    """What came out of drawing all masks again.

    Args:
        seen: parameters that a client has seen after each release, clear ones aside: [releases].
        units: group -> share of its units that each client has seen, [clients], server-hidden ones counted as unseen.
        bits: a bit for each server-visible unit that a client has seen, [clients, words]; weights: of the words' bits,
            in parameters.
    """

    seen: NDArray[np.float64]
    units: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    bits: NDArray[np.uint64] = field(default_factory=lambda: np.zeros((0, 0), np.uint64))
    weights: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))


def _replay(job: JobKey, history: _History, sample: _Sample) -> _Replayed:
    replayed = _Replayed(np.zeros(len(history.scopes)))
    seeds, steps = Seeds(job.key, history.scopes), history.steps()
    visible = {name: size * (1.0 - job.hides(name, n) / n) for name, (n, size) in job.groups.items() if n}
    looked_at = sum(visible[name] for name in sample.units)
    grown = sum(visible.values()) / looked_at if looked_at else 0.0  # each group stands for others too, when sampled
    bits, weights = [], []
    for name, units in sample.units.items():
        group = _Group.of(job, name, units)
        totals, flags = _replay_group(group, steps, len(history.lines), seeds, replayed.seen, grown * visible[name])
        replayed.units[name] = totals / group.allowed.size * visible[name] / max(job.groups[name][1], 1)
        bits.append(_words(flags))
        weights.append(np.full(bits[-1].shape[1], grown * visible[name] / group.allowed.size))
    if bits:
        replayed.bits, replayed.weights = np.hstack(bits), np.concatenate(weights)
    return replayed


@dataclass(frozen=True)
class _Group:
    """The units of one group that are looked at: the first `units` of `of_all`; allowed are the server-visible ones."""

    name: str
    units: int
    of_all: int
    allowed: Ints

    @classmethod
    def of(cls, job: JobKey, name: str, units: int) -> _Group:
        of_all = job.groups[name][0]
        if units == of_all:
            hidden = hidden_units(job.key, name, units, job.ratio(name))
        else:  # the threshold stands for the count: of many ranks a share of p1 lies below p1
            hidden = ranks(job.key, SERVER, name, units) < np.uint64(int(job.ratio(name) * 2.0**64))
        allowed = np.flatnonzero(~hidden)
        return cls(name, units, of_all, allowed if allowed.size else np.zeros(1, np.int64))

    def hidden(self, ratio: float) -> int:
        """Units that a release hides; -1 where only some are looked at, and ranks are held against a threshold."""
        return hidden_count(self.allowed.size, ratio) if self.units == self.of_all else -1


def _replay_group(
    group: _Group, steps: _Steps, count: int, seeds: Seeds, seen: NDArray[np.float64], size: float
) -> tuple[Ints, NDArray[np.uint8]]:
    """Adds to `seen` after each release; returns how many units each client has seen, and which: [count, v]."""
    many = group.allowed.size
    flags = np.zeros((count, many), np.uint8)
    totals = np.zeros(count, np.int64)
    hidden = np.array([group.hidden(ratio) for ratio in steps.kinds.tolist()], np.int64)[steps.kind]
    least = (steps.kinds * 2.0**64).astype(np.uint64)[steps.kind]
    shift = np.uint64(64 - min(max(many.bit_length() - 1, 4), 16))
    for first, last in zip(steps.edges, steps.edges[1:], strict=False):
        if (totals == many).all():
            seen[steps.lines[first:]] += size
            break
        mine = np.flatnonzero((totals[steps.clients[first:last]] < many) & ~steps.again[first:last]) + first
        if len(mine):
            who, found = steps.clients[mine], np.zeros(len(mine), np.int64)
            rows = seeds.of(steps.lines[mine].tolist(), group.name), who, hidden[mine], least[mine], found

            def part(a: int, b: int, rows: Any = rows) -> None:
                drawn, who, hides, below, found = rows
                show(drawn, who, a, b, group.allowed, group.units, hides, below, shift, flags, found)

            run_ranges(len(mine), 8, part)
            totals[who] = found
        seen[steps.lines[first:last]] += size * totals[steps.clients[first:last]] / many
    return totals, flags


def _words(flags: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """One bit a unit, in words of 64: [clients, words]."""
    packed = np.packbits(flags, axis=1)
    padded = np.zeros((len(flags), -(-packed.shape[1] // 8) * 8), np.uint8)
    padded[:, : packed.shape[1]] = packed
    return padded.view(np.uint64)


def module(group: str) -> str:
    """The module that a group of units belongs to: its name without `.weight`, experts of one stack together."""
    return group.split("#")[0].removesuffix(".weight")


def _heat(
    job: JobKey, clients: Sequence[ClientExposure], units: Mapping[str, NDArray[np.float64]]
) -> tuple[tuple[str, str, float], ...]:
    """(client, module, share of its parameters seen) for the clients that have seen most, in the ledger's order."""
    sizes: dict[str, float] = {}
    seen: dict[str, NDArray[np.float64]] = {}
    for name, shares in units.items():
        size = job.groups[name][1]
        sizes[module(name)] = sizes.get(module(name), 0.0) + size
        seen[module(name)] = seen.get(module(name), np.zeros(len(clients))) + size * shares
    most = sorted(range(len(clients)), key=lambda i: -clients[i].shares[-1])[:HEAT_CLIENTS]
    return tuple(
        (clients[i].client, name, float(seen[name][i] / size))
        for i in sorted(most)
        for name, size in sizes.items()
        if size
    )
