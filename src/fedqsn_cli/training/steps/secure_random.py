"""Random numbers that nobody can repeat or predict: made from the operating system's random bytes, without a seed.

Noise from a seeded generator protects nothing against someone who knows or guesses the seed: it can be taken off.
"""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

_PIECE = 1 << 20  # numbers at a time
_BITS = 53  # of a double


def uniforms(count: int) -> NDArray[np.float64]:
    """`count` independent numbers, uniform between 0 and 1, neither included."""
    words = np.frombuffer(os.urandom(8 * count), np.uint64)
    return ((words >> np.uint64(64 - _BITS)).astype(np.float64) + 0.5) * 2.0**-_BITS


def normals(count: int) -> NDArray[np.float32]:
    """`count` independent numbers of the standard normal distribution, by the inverse of its distribution function."""
    from scipy.special import ndtri

    out = np.empty(count, np.float32)
    for first in range(0, count, _PIECE):
        part = out[first : first + _PIECE]
        part[:] = ndtri(uniforms(part.size))
    return out
