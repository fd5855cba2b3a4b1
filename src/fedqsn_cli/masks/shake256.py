"""SHAKE-256 as a stream: ranks of very large groups, drawn and compared without ever being in memory together.

hashlib squeezes all output at once, 8 bytes a unit. Here the sponge runs block by block, and one block of SHAKE-256 is
17 lanes of 64 bits, that is 17 ranks. Source: FIPS 202, sections 3.2 (the steps of a round) and 6.2 (SHAKE256).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.kernels.jit import kernel

RATE_LANES = 17
_TOP = 2**64 - 1  # the highest rank
WINDOW = 10, 64

ROUND_CONSTANTS = np.array(
    [
        0x0000000000000001,
        0x0000000000008082,
        0x800000000000808A,
        0x8000000080008000,
        0x000000000000808B,
        0x0000000080000001,
        0x8000000080008081,
        0x8000000000008009,
        0x000000000000008A,
        0x0000000000000088,
        0x0000000080008009,
        0x000000008000000A,
        0x000000008000808B,
        0x800000000000008B,
        0x8000000000008089,
        0x8000000000008003,
        0x8000000000008002,
        0x8000000000000080,
        0x000000000000800A,
        0x800000008000000A,
        0x8000000080008081,
        0x8000000000008080,
        0x0000000080000001,
        0x8000000080008008,
    ],
    np.uint64,
)


def initial_state(seed: bytes) -> NDArray[np.uint64]:
    """The sponge after absorbing a seed of at most 135 bytes, before the first permutation, shape (25,)."""
    if len(seed) >= 8 * RATE_LANES:
        raise ValueError("the seed must fit one block")
    block = bytearray(200)
    block[: len(seed)] = seed
    block[len(seed)] ^= 0x1F  # SHAKE's domain bits 1111 and the first bit of the padding
    block[8 * RATE_LANES - 1] ^= 0x80
    return np.frombuffer(bytes(block), "<u8").astype(np.uint64)


@kernel
def _rotate_left(lane: Any, bits: Any) -> Any:
    return (lane << np.uint64(bits)) | (lane >> np.uint64(64 - bits))


@kernel
def _chi(a: Any, b: Any, c: Any, d: Any, e: Any) -> Any:
    return a ^ (~b & c), b ^ (~c & d), c ^ (~d & e), d ^ (~e & a), e ^ (~a & b)


@kernel
def permutation_round(s: Any, constant: Any) -> Any:
    """One round of Keccak-f[1600] on 25 lanes, lane (x, y) at 5y + x."""
    c0, c1, c2 = (
        s[0] ^ s[5] ^ s[10] ^ s[15] ^ s[20],
        s[1] ^ s[6] ^ s[11] ^ s[16] ^ s[21],
        s[2] ^ s[7] ^ s[12] ^ s[17] ^ s[22],
    )
    c3, c4 = s[3] ^ s[8] ^ s[13] ^ s[18] ^ s[23], s[4] ^ s[9] ^ s[14] ^ s[19] ^ s[24]
    d0, d1, d2 = c4 ^ _rotate_left(c1, 1), c0 ^ _rotate_left(c2, 1), c1 ^ _rotate_left(c3, 1)
    d3, d4 = c2 ^ _rotate_left(c4, 1), c3 ^ _rotate_left(c0, 1)
    first = _chi(
        s[0] ^ d0,
        _rotate_left(s[6] ^ d1, 44),
        _rotate_left(s[12] ^ d2, 43),
        _rotate_left(s[18] ^ d3, 21),
        _rotate_left(s[24] ^ d4, 14),
    )
    return (
        (first[0] ^ constant, first[1], first[2], first[3], first[4])
        + _chi(
            _rotate_left(s[3] ^ d3, 28),
            _rotate_left(s[9] ^ d4, 20),
            _rotate_left(s[10] ^ d0, 3),
            _rotate_left(s[16] ^ d1, 45),
            _rotate_left(s[22] ^ d2, 61),
        )
        + _chi(
            _rotate_left(s[1] ^ d1, 1),
            _rotate_left(s[7] ^ d2, 6),
            _rotate_left(s[13] ^ d3, 25),
            _rotate_left(s[19] ^ d4, 8),
            _rotate_left(s[20] ^ d0, 18),
        )
        + _chi(
            _rotate_left(s[4] ^ d4, 27),
            _rotate_left(s[5] ^ d0, 36),
            _rotate_left(s[11] ^ d1, 10),
            _rotate_left(s[17] ^ d2, 15),
            _rotate_left(s[23] ^ d3, 56),
        )
        + _chi(
            _rotate_left(s[2] ^ d2, 62),
            _rotate_left(s[8] ^ d3, 55),
            _rotate_left(s[14] ^ d4, 39),
            _rotate_left(s[15] ^ d0, 41),
            _rotate_left(s[21] ^ d1, 2),
        )
    )


@kernel
def _permute(state: Any) -> None:
    """Keccak-f[1600], in place."""
    s = (
        state[0],
        state[1],
        state[2],
        state[3],
        state[4],
        state[5],
        state[6],
        state[7],
        state[8],
        state[9],
        state[10],
        state[11],
        state[12],
        state[13],
        state[14],
        state[15],
        state[16],
        state[17],
        state[18],
        state[19],
        state[20],
        state[21],
        state[22],
        state[23],
        state[24],
    )
    for constant in ROUND_CONSTANTS:
        s = permutation_round(s, constant)
    for lane in range(25):
        state[lane] = s[lane]


@kernel
def _select(state: Any, allowed: Any, low: Any, high: Any, mask: Any, where: Any, what: Any) -> Any:
    """Mark allowed units of rank < low; collect those of rank low ... high; return how many of both."""
    below, found, n = 0, 0, mask.size
    for start in range(0, n, RATE_LANES):
        _permute(state)
        for lane in range(min(RATE_LANES, n - start)):
            unit, rank = start + lane, state[lane]
            lower = allowed[unit] & (rank < low)
            mask[unit] = lower
            below += lower
            if allowed[unit] and not lower and rank <= high:
                if found < where.size:
                    where[found], what[found] = unit, rank
                found += 1
    return below, found


@dataclass(frozen=True, slots=True)
class LastChosen:
    """The unit of the highest rank among those that were chosen; of several of that rank the last."""

    rank: int
    unit: int


def lowest_ranks(
    seed: bytes, allowed: NDArray[np.bool_], count: int, window: tuple[float, float] = WINDOW
) -> tuple[NDArray[np.bool_], LastChosen] | None:
    """The `count` allowed units of lowest rank, ties by lowest index, and the last of them.

    Ranks are uniform, so the highest rank that is still chosen is within a narrow window around its expectation:
    one pass marks everything below that window and keeps the few ranks inside.

    Args:
        seed: of SHAKE-256, 32 bytes.
        allowed: which units may be chosen, shape (n,).
        window: half its width, in standard deviations and in units beyond that.

    Returns:
        Shape (n,), or None in the practically impossible case that the window missed.
    """
    total = int(np.count_nonzero(allowed))
    share = count / total
    deviations, slack = window
    spread = deviations * (share * (1 - share) / total) ** 0.5 + slack / total
    low, high = (min(int(min(max(edge, 0.0), 1.0) * 2.0**64), _TOP) for edge in (share - spread, share + spread))
    room = int(4 * spread * total) + 1024
    where, what = np.empty(room, np.int64), np.empty(room, np.uint64)
    mask = np.empty(allowed.size, np.bool_)
    below, found = _select(initial_state(seed), allowed, np.uint64(low), np.uint64(high), mask, where, what)
    missing = count - below
    if not 0 <= missing <= found <= room:
        return None
    order = np.lexsort((where[:found], what[:found]))[:missing]
    mask[where[order]] = True
    last = LastChosen(int(what[order[-1]]), int(where[order[-1]])) if missing else LastChosen(low - 1, allowed.size)
    return mask, last


class RankStream:
    """The ranks of a group, from its first unit to its last, compared as they come."""

    def __init__(self, seed: bytes) -> None:
        self._state = initial_state(seed)
        self._unit = 0

    def chosen(self, count: int, last: LastChosen) -> NDArray[np.bool_]:
        """Which of the next `count` units come before the last one that was chosen, or are it."""
        chosen = np.empty(count, np.bool_)
        _compare(self._state, self._unit, np.uint64(last.rank), last.unit, chosen)
        self._unit += count
        return chosen


@kernel
def _compare(state: Any, first: int, rank: Any, unit: int, chosen: Any) -> None:
    for i in range(chosen.size):
        lane = (first + i) % RATE_LANES
        if lane == 0:
            _permute(state)
        chosen[i] = state[lane] < rank or (state[lane] == rank and first + i <= unit)
