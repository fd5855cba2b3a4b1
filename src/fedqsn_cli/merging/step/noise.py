"""Gaussian noise from the job's key, so that nobody without the key can tell it from true noise.

    block b of a tensor   SHAKE-256(seed ‖ name ‖ b) as 64-bit numbers, little-endian, in pairs (x, y)
    u, v                  (⌊x / 2^11⌋ + 1) / 2^53 and ⌊y / 2^11⌋ / 2^53
    two normal numbers    √(-2 ln u) cos 2πv and √(-2 ln u) sin 2πv           (Box and Muller 1958)

The noise of a weight depends on its place alone: chunks and threads change nothing. The last bits of ln, cos and sin,
and so of a weight at times, depend on the machine's mathematical library.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.kernels.jit import kernel

Doubles = NDArray[np.float64]

BLOCK = 1 << 15  # numbers that one call of SHAKE-256 makes


class Noise:
    """Independent normal numbers for all weights of a model.

    Args:
        seed: 32 secret bytes, never used for other data. deviation: the standard deviation.
    """

    def __init__(self, seed: bytes, deviation: float) -> None:
        self._seed = seed
        self._deviation = deviation

    def add_to(self, total: Doubles, name: str, first: int) -> None:
        """Add noise to weights of a tensor, from flat position `first` on; in place."""
        flat = total.reshape(-1)
        start = 0
        while start < flat.size:
            block, skip = divmod(first + start, BLOCK)
            count = min(BLOCK - skip, flat.size - start)
            flat[start : start + count] += self._deviation * self._normal(name, block, skip + count)[skip:]
            start += count

    def _normal(self, name: str, block: int, count: int) -> Doubles:
        """The first `count` numbers of a block."""
        message = self._seed + block.to_bytes(8, "big") + name.encode()
        bits = np.frombuffer(hashlib.shake_256(message).digest(16 * -(-count // 2)), "<u8")
        numbers = np.empty(bits.size)
        _box_muller(bits, numbers)
        return numbers[:count]


@kernel
def _box_muller(bits: Any, out: Any) -> None:
    for i in range(0, bits.size, 2):
        u = (np.float64(bits[i] >> np.uint64(11)) + 1.0) * 2.0**-53
        angle = 2.0 * math.pi * (np.float64(bits[i + 1] >> np.uint64(11)) * 2.0**-53)
        radius = math.sqrt(-2.0 * math.log(u))
        out[i] = radius * math.cos(angle)
        out[i + 1] = radius * math.sin(angle)
