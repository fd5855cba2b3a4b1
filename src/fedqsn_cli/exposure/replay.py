"""Client masks drawn again by the hundred thousand: what `masks.draw.client_units` gives, eight clients at a time.

Seeds come from hmac, which is fast for one short message after another; SHAKE-256 (FIPS 202) is compiled. Eight
sponges are interleaved, lane i of sponge c at 8i + c, which lets the compiler work on several with one instruction.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.kernels.jit import kernel
from fedqsn_cli.masks.draw import LABEL, field_bytes
from fedqsn_cli.masks.shake256 import RATE_LANES, ROUND_CONSTANTS, permutation_round


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
def _show(ranks: Any, allowed: Any, hidden: int, shift: Any, bins: Any, near: Any, seen: Any) -> Any:
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
def _show_above(ranks: Any, allowed: Any, least: Any, seen: Any) -> Any:
    """Mark in seen the allowed units of rank `least` or more; returns how many are marked."""
    total = 0
    for j in range(allowed.size):
        if ranks[allowed[j]] >= least:
            seen[j] = 1
        total += seen[j]
    return total


@kernel
def show(
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
                totals[release] = _show_above(ranks[lane], allowed, least[release], mine)
            else:
                totals[release] = _show(ranks[lane], allowed, hidden[release], shift, bins, near, mine)
