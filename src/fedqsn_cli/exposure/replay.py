"""Client masks drawn again by the hundred thousand: what `masks.draw.client_units` gives, eight clients at a time.

A client that has seen all that the server mask leaves of a group needs no further draws of it. Of a group of which only
some units are looked at, a rank is held against a threshold instead of being counted: of many ranks a share of p lies
below p. Seeds come from hmac, which is fast for one short message after another; SHAKE-256 (FIPS 202) is compiled.
Eight sponges are interleaved, lane i of sponge c at 8i + c, which lets the compiler work on several with one
instruction.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.exposure.history import History, Sample, Steps
from fedqsn_cli.kernels.jit import kernel
from fedqsn_cli.kernels.threads import run_ranges
from fedqsn_cli.masks.draw import LABEL, SERVER, field_bytes, hidden_count, hidden_units, ranks
from fedqsn_cli.masks.job_key import JobKey
from fedqsn_cli.masks.shake256 import RATE_LANES, ROUND_CONSTANTS, permutation_round

Ints = NDArray[np.int64]


@dataclass
class Replayed:
    """What came out of drawing all masks again.

    Args:
        seen: parameters that a client has seen after each release, clear ones aside: [releases].
        units: group -> share of its units that each client has seen, [clients], server-hidden ones counted as unseen.
        bits: a bit for each server-visible unit that a client has seen, [clients, words]; weights: of the words' bits,
            in parameters.
        ranks: how many were drawn.
    """

    seen: NDArray[np.float64]
    units: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    bits: NDArray[np.uint64] = field(default_factory=lambda: np.zeros((0, 0), np.uint64))
    weights: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    ranks: int = 0


def replay(job: JobKey, history: History, sample: Sample) -> Replayed:
    """Draw the masks of all releases again, as far as they are looked at."""
    nobody = np.zeros((len(history.lines), 0), np.uint64)
    replayed = Replayed(np.zeros(len(history.scopes)), bits=nobody)
    seeds, steps = Seeds(job.key, history.scopes), history.steps()
    visible = {name: size * (1.0 - job.hides(name, n) / n) for name, (n, size) in job.groups.items() if n}
    looked_at = sum(visible[name] for name in sample.units)
    grown = sum(visible.values()) / looked_at if looked_at else 0.0  # each group stands for others too, when sampled
    bits, weights = [], []
    for name, units in sample.units.items():
        if not visible[name]:  # the server hides all of it
            replayed.units[name] = np.zeros(len(history.lines))
            continue
        group = _Group.of(job, name, units)
        totals, flags = _replay_group(group, steps, seeds, replayed, grown * visible[name])
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
    group: _Group, steps: Steps, seeds: Seeds, replayed: Replayed, size: float
) -> tuple[Ints, NDArray[np.uint8]]:
    """Add a group to what was seen after each release.

    Args:
        size: of its server-visible units, in parameters.

    Returns:
        How many of its units each client has seen, [clients], and which, [clients, v].
    """
    many, seen = group.allowed.size, replayed.seen
    flags = np.zeros((steps.clients.max(initial=-1) + 1, many), np.uint8)
    totals = np.zeros(len(flags), np.int64)
    hidden = np.array([group.hidden(ratio) for ratio in steps.kinds.tolist()], np.int64)[steps.kind]
    least = (steps.kinds * 2.0**64).astype(np.uint64)[steps.kind]
    shift = np.uint64(64 - min(max(many.bit_length() - 1, 4), 16))
    for first, last in zip(steps.edges, steps.edges[1:], strict=False):
        if (totals == many).all():
            seen[steps.lines[first:]] += size
            break
        unsated = (totals[steps.clients[first:last]] < many) & ~steps.again[first:last]
        chosen = np.flatnonzero(unsated) + first
        if len(chosen):
            clients, found = steps.clients[chosen], np.zeros(len(chosen), np.int64)
            rows = seeds.of(steps.lines[chosen].tolist(), group.name), clients, hidden[chosen], least[chosen], found

            def part(first: int, stop: int, rows: Any = rows) -> None:
                drawn, clients, hides, below, found = rows
                allowed, units = group.allowed, group.units
                mark_visible(drawn, clients, first, stop, allowed, units, hides, below, shift, flags, found)

            run_ranges(len(chosen), 8, part)
            replayed.ranks += len(chosen) * group.units
            totals[clients] = found
        seen[steps.lines[first:last]] += size * totals[steps.clients[first:last]] / many
    return totals, flags


def _words(flags: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """One bit a unit, in words of 64: [clients, words]."""
    packed = np.packbits(flags, axis=1)
    padded = np.zeros((len(flags), -(-packed.shape[1] // 8) * 8), np.uint8)
    padded[:, : packed.shape[1]] = packed
    return padded.view(np.uint64)


class Seeds:
    """HMAC-SHA256 of many messages under one key, as `masks.draw.seed` computes it.

    The message is "fedqsn/v1" ‖ scope ‖ group; all but the group is absorbed once per scope.
    """

    def __init__(self, key: bytes, scopes: Sequence[tuple[str, ...]]) -> None:
        self._start, self._scopes = hmac.new(key, field_bytes(LABEL), "sha256"), scopes
        self._states: list[hmac.HMAC | None] = [None] * len(scopes)

    def of(self, scopes: Iterable[int], group: str) -> NDArray[np.uint64]:
        """Seeds of a group for the scopes of these numbers: [m, 4], 32 bytes each."""
        tail = field_bytes(group)
        digests = []
        for number in scopes:
            message = self._state(number).copy()
            message.update(tail)
            digests.append(message.digest())
        return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64, copy=False).reshape(-1, 4)

    def _state(self, number: int) -> hmac.HMAC:
        state = self._states[number]
        if state is None:
            state = self._states[number] = self._start.copy()
            state.update(b"".join(map(field_bytes, self._scopes[number])))
        return state


@kernel
def _permute(a: Any) -> None:
    """Keccak-f[1600] on eight interleaved sponges, uint64 [200], in place."""
    for constant in ROUND_CONSTANTS:
        for i in range(8):
            s = (
                a[i],
                a[8 + i],
                a[16 + i],
                a[24 + i],
                a[32 + i],
                a[40 + i],
                a[48 + i],
                a[56 + i],
                a[64 + i],
                a[72 + i],
                a[80 + i],
                a[88 + i],
                a[96 + i],
                a[104 + i],
                a[112 + i],
                a[120 + i],
                a[128 + i],
                a[136 + i],
                a[144 + i],
                a[152 + i],
                a[160 + i],
                a[168 + i],
                a[176 + i],
                a[184 + i],
                a[192 + i],
            )
            t = permutation_round(s, constant)
            a[i], a[8 + i], a[16 + i], a[24 + i], a[32 + i] = t[0], t[1], t[2], t[3], t[4]
            a[40 + i], a[48 + i], a[56 + i], a[64 + i], a[72 + i] = t[5], t[6], t[7], t[8], t[9]
            a[80 + i], a[88 + i], a[96 + i], a[104 + i], a[112 + i] = t[10], t[11], t[12], t[13], t[14]
            a[120 + i], a[128 + i], a[136 + i], a[144 + i], a[152 + i] = t[15], t[16], t[17], t[18], t[19]
            a[160 + i], a[168 + i], a[176 + i], a[184 + i], a[192 + i] = t[20], t[21], t[22], t[23], t[24]


@kernel
def _squeeze(sponges: Any, out: Any) -> None:
    """The first ranks of eight sponges: out uint64 [8, units]."""
    units = out.shape[1]
    for start in range(0, units, RATE_LANES):
        _permute(sponges)
        for lane in range(8):
            for i in range(min(RATE_LANES, units - start)):
                out[lane, start + i] = sponges[8 * i + lane]


@kernel
def _mark(ranks: Any, allowed: Any, hidden: int, shift: Any, bins: Any, near: Any, seen: Any) -> Any:
    """Mark in seen (uint8 [v]) the allowed units but the `hidden` ones of lowest rank; returns how many are marked.

    Ranks are counted by their highest bits; only those in the bin where the count is reached have to be sorted.
    """
    bins[:] = 0
    for j in range(allowed.size):
        bins[np.int64(ranks[allowed[j]] >> shift)] += 1
    edge, below = 0, 0
    while below + bins[edge] < hidden:
        below += bins[edge]
        edge += 1
    found = 0
    for j in range(allowed.size):  # insertion in order of ranks; of equal ranks the first unit comes first
        if np.int64(ranks[allowed[j]] >> shift) == edge:
            i = found
            while i > 0 and ranks[allowed[near[i - 1]]] > ranks[allowed[j]]:
                near[i] = near[i - 1]
                i -= 1
            near[i] = j
            found += 1
    total = 0
    for j in range(allowed.size):
        if np.int64(ranks[allowed[j]] >> shift) > edge:
            seen[j] = 1
    for i in range(hidden - below, found):
        seen[near[i]] = 1
    for j in range(allowed.size):
        total += seen[j]
    return total


@kernel
def _mark_above(ranks: Any, allowed: Any, least: Any, seen: Any) -> Any:
    """Mark in seen the allowed units of rank `least` or more; returns how many are marked."""
    total = 0
    for j in range(allowed.size):
        if ranks[allowed[j]] >= least:
            seen[j] = 1
        total += seen[j]
    return total


@kernel
def mark_visible(
    seeds: Any,
    clients: Any,
    first: int,
    last: int,
    allowed: Any,
    units: int,
    hidden: Any,
    least: Any,
    shift: Any,
    seen: Any,
    totals: Any,
) -> None:
    """Add what releases first ... last - 1 show of one group to what their clients have seen.

    Args:
        seeds: uint64 [releases, 4]. clients: rows of seen, int64 [releases]; no client twice.
        allowed: server-visible units among the first `units` ones, int64 [v].
        hidden: how many of them a release hides (exact); if that is negative, those with a rank below `least` are.
        shift: 64 less the number of bits by which ranks are binned, uint64.
        seen: uint8 [clients, v], added to. totals: out, int64 [releases], units that the client has seen by then.
    """
    sponges, ranks = np.zeros(200, np.uint64), np.empty((8, units), np.uint64)
    bins, near = np.empty(np.int64(1) << np.int64(64 - shift), np.int64), np.empty(allowed.size, np.int64)
    for batch in range(first, last, 8):
        many = min(8, last - batch)
        sponges[:] = 0
        for lane in range(many):
            for i in range(4):
                sponges[8 * i + lane] = seeds[batch + lane, i]
            sponges[8 * 4 + lane] = 0x1F  # SHAKE's domain bits and the first bit of the padding
            sponges[8 * 16 + lane] = np.uint64(1) << np.uint64(63)  # its last bit
        _squeeze(sponges, ranks)
        for lane in range(many):
            release = batch + lane
            mine = seen[clients[release]]
            if hidden[release] < 0:
                totals[release] = _mark_above(ranks[lane], allowed, least[release], mine)
            else:
                totals[release] = _mark(ranks[lane], allowed, hidden[release], shift, bins, near, mine)
