"""Client masks drawn again by the million: what `masking.client_units` gives, eight clients at a time.

The seed of every draw is HMAC-SHA256 (FIPS 180-4, RFC 2104), the ranks are SHAKE-256 (FIPS 202), as `masking` has them;
here both are compiled, so that a thousand clients' hundred rounds take seconds. The eight sponges lie interleaved,
lane i of client c at 8i + c, which lets the compiler work on several with one instruction.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.keccak import _ROUND_CONSTANTS, RATE_LANES, _round
from fedqsn_cli.quantization.jit import kernel

_SHA_START = np.array(
    [0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19], np.uint32
)  # fmt: skip
_SHA_CONSTANTS = np.array(
    [
        0x428A2F98, 0x71374491, 0xB5C0FBCF, 0xE9B5DBA5, 0x3956C25B, 0x59F111F1, 0x923F82A4, 0xAB1C5ED5,
        0xD807AA98, 0x12835B01, 0x243185BE, 0x550C7DC3, 0x72BE5D74, 0x80DEB1FE, 0x9BDC06A7, 0xC19BF174,
        0xE49B69C1, 0xEFBE4786, 0x0FC19DC6, 0x240CA1CC, 0x2DE92C6F, 0x4A7484AA, 0x5CB0A9DC, 0x76F988DA,
        0x983E5152, 0xA831C66D, 0xB00327C8, 0xBF597FC7, 0xC6E00BF3, 0xD5A79147, 0x06CA6351, 0x14292967,
        0x27B70A85, 0x2E1B2138, 0x4D2C6DFC, 0x53380D13, 0x650A7354, 0x766A0ABB, 0x81C2C92E, 0x92722C85,
        0xA2BFE8A1, 0xA81A664B, 0xC24B8B70, 0xC76C51A3, 0xD192E819, 0xD6990624, 0xF40E3585, 0x106AA070,
        0x19A4C116, 0x1E376C08, 0x2748774C, 0x34B0BCB5, 0x391C0CB3, 0x4ED8AA4A, 0x5B9CCA4F, 0x682E6FF3,
        0x748F82EE, 0x78A5636F, 0x84C87814, 0x8CC70208, 0x90BEFFFA, 0xA4506CEB, 0xBEF9A3F7, 0xC67178F2,
    ],
    np.uint32,
)  # fmt: skip


@kernel
def _turned(word: Any, bits: Any) -> Any:
    """A 32-bit word rotated to the right."""
    return np.uint32((word >> np.uint32(bits)) | (word << np.uint32(32 - bits)))


@kernel
def compress(state: Any, block: Any) -> None:
    """One block (uint8 [64]) into a SHA-256 state (uint32 [8]), in place."""
    words = np.empty(64, np.uint32)
    for i in range(16):
        words[i] = (
            (np.uint32(block[4 * i]) << np.uint32(24)) | (np.uint32(block[4 * i + 1]) << np.uint32(16))
            | (np.uint32(block[4 * i + 2]) << np.uint32(8)) | np.uint32(block[4 * i + 3])
        )  # fmt: skip
    for i in range(16, 64):
        x, y = words[i - 15], words[i - 2]
        small = _turned(x, 7) ^ _turned(x, 18) ^ (x >> np.uint32(3))
        large = _turned(y, 17) ^ _turned(y, 19) ^ (y >> np.uint32(10))
        words[i] = np.uint32(words[i - 16] + small + words[i - 7] + large)
    a, b, c, d, e, f, g, h = state[0], state[1], state[2], state[3], state[4], state[5], state[6], state[7]
    for i in range(64):
        one = np.uint32(h + (_turned(e, 6) ^ _turned(e, 11) ^ _turned(e, 25)) + ((e & f) ^ (~e & g)))
        one = np.uint32(one + _SHA_CONSTANTS[i] + words[i])
        two = np.uint32((_turned(a, 2) ^ _turned(a, 13) ^ _turned(a, 22)) + ((a & b) ^ (a & c) ^ (b & c)))
        h, g, f, e, d, c, b, a = g, f, e, np.uint32(d + one), c, b, a, np.uint32(one + two)
    state[0], state[1], state[2], state[3] = state[0] + a, state[1] + b, state[2] + c, state[3] + d
    state[4], state[5], state[6], state[7] = state[4] + e, state[5] + f, state[6] + g, state[7] + h


def keyed_states(key: bytes) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """SHA-256 states after HMAC's inner and outer key block."""
    states = []
    for pad in (0x36, 0x5C):
        state = _SHA_START.copy()
        compress(state, np.frombuffer(key.ljust(64, b"\0"), np.uint8) ^ np.uint8(pad))
        states.append(state)
    return states[0], states[1]


@kernel
def _close(state: Any, block: Any, used: int, length: int) -> None:
    """Pad the last block, of which `used` bytes are filled, of a message of `length` bytes, and compress it."""
    block[used] = 0x80
    block[used + 1 :] = 0
    if used >= 56:
        compress(state, block)
        block[:] = 0
    for i in range(8):
        block[63 - i] = np.uint8((8 * length) >> (8 * i))
    compress(state, block)


@kernel
def hmac_words(inner: Any, outer: Any, head: Any, tail: Any, block: Any, words: Any) -> None:
    """HMAC-SHA256 of head ‖ tail into words (uint32 [8]); block is scratch, uint8 [64]."""
    words[:] = inner
    used = 0
    for i in range(head.size + tail.size):
        block[used] = head[i] if i < head.size else tail[i - head.size]
        used += 1
        if used == 64:
            compress(words, block)
            used = 0
    _close(words, block, used, 64 + head.size + tail.size)
    for i in range(32):
        block[i] = np.uint8(words[i >> 2] >> np.uint32(24 - 8 * (i & 3)))
    words[:] = outer
    _close(words, block, 32, 96)


@kernel
def _swapped(word: Any) -> Any:
    """A 32-bit word with its bytes turned round, as 64 bits."""
    a, b = (word & np.uint32(0xFF)) << np.uint32(24), (word & np.uint32(0xFF00)) << np.uint32(8)
    c, d = (word >> np.uint32(8)) & np.uint32(0xFF00), word >> np.uint32(24)
    return np.uint64(np.uint32(a | b | c | d))


@kernel
def _absorb(sponges: Any, lane: int, words: Any) -> None:
    """Start sponge `lane` of the eight with a seed of 32 bytes."""
    for i in range(25):
        sponges[8 * i + lane] = 0
    for i in range(4):
        sponges[8 * i + lane] = _swapped(words[2 * i]) | (_swapped(words[2 * i + 1]) << np.uint64(32))
    sponges[8 * 4 + lane] = 0x1F
    sponges[8 * 16 + lane] = np.uint64(1) << np.uint64(63)


@kernel
def _permute(a: Any) -> None:
    """Keccak-f[1600] on eight interleaved sponges, uint64 [200], in place."""
    for constant in _ROUND_CONSTANTS:
        for i in range(8):
            s = (
                a[i], a[8 + i], a[16 + i], a[24 + i], a[32 + i], a[40 + i], a[48 + i], a[56 + i], a[64 + i], a[72 + i],
                a[80 + i], a[88 + i], a[96 + i], a[104 + i], a[112 + i], a[120 + i], a[128 + i], a[136 + i],
                a[144 + i], a[152 + i], a[160 + i], a[168 + i], a[176 + i], a[184 + i], a[192 + i],
            )  # fmt: skip
            t = _round(s, constant)
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
def replay(
    inner: Any, outer: Any, heads: Any, sizes: Any, again: Any, starts: Any, first: int, last: int, tail: Any,
    allowed: Any, units: int, hidden: Any, least: Any, shift: Any, seen: Any, shown: Any,
) -> None:  # fmt: skip
    """What clients first ... last - 1 have seen of one group, release by release; a client that saw all is done.

    Args:
        inner, outer: from `keyed_states`. tail: the group's field of the HMAC message.
        heads, sizes: the message before it, uint8 [releases, w], and its length.
        again: 1 for a release whose mask is that of an earlier release of the same client.
        starts: releases of client c are starts[c] ... starts[c + 1] - 1.
        allowed: server-visible units among the first `units` ones, int64 [v].
        hidden: how many of them a release hides (exact); if that is negative, those with a rank below `least` are.
        shift: 64 less the number of bits by which ranks are binned, uint64.
        seen: out, uint8 [clients, v]. shown: out, int64 [releases], units seen after the release.
    """
    sponges, ranks = np.zeros(200, np.uint64), np.empty((8, units), np.uint64)
    block, words = np.empty(64, np.uint8), np.empty(8, np.uint32)
    bins, near = np.empty(np.int64(1) << np.int64(64 - shift), np.int64), np.empty(allowed.size, np.int64)
    for batch in range(first, last, 8):
        many = min(8, last - batch)
        steps = 0
        for lane in range(many):
            steps = max(steps, starts[batch + lane + 1] - starts[batch + lane])
        for step in range(steps):
            drawn = 0
            for lane in range(many):
                release = starts[batch + lane] + step
                if release < starts[batch + lane + 1]:
                    before = shown[release - 1] if step else 0
                    shown[release] = before
                    if before < allowed.size and not again[release]:
                        hmac_words(inner, outer, heads[release, : sizes[release]], tail, block, words)
                        _absorb(sponges, lane, words)
                        drawn |= 1 << lane
            if drawn:
                _squeeze(sponges, ranks)
            for lane in range(many):
                if drawn >> lane & 1:
                    release = starts[batch + lane] + step
                    mine = seen[batch + lane]
                    if hidden[release] < 0:
                        shown[release] = _show_above(ranks[lane], allowed, least[release], mine)
                    elif hidden[release] == 0:
                        mine[:] = 1
                        shown[release] = allowed.size
                    else:
                        shown[release] = _show(ranks[lane], allowed, hidden[release], shift, bins, near, mine)
