"""Blocks of fp32 values against a codebook: what packing and snapping share.

bitsandbytes (backends/default/ops.py) treats a last, shorter block differently: it divides by absmax where full blocks
are multiplied by its reciprocal, and the absmax that it stores is at least 1e-38.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedqsn_cli.kernels.jit import MAGNITUDE, kernel, to_bits, to_float, view_kernel

SMALLEST = np.float32(1e-38)
BATCH = 1024  # values that go through each step together: they stay in the first cache


@kernel
def largest(values: Any) -> Any:
    """The largest magnitude; NaN or infinity if there is one. Compares bits, which vectorises and sees NaN."""
    most = np.uint32(0)
    for i in range(values.size):  # from 0: an index that cannot be negative is what lets LLVM vectorise
        magnitude = np.uint32(to_bits(values[i]) & MAGNITUDE)
        most = magnitude if magnitude > most else most
    return to_float(most)


@kernel
def normalize(values: Any, absmax: Any, short: bool, out: Any) -> None:
    """out = values / absmax, as bitsandbytes rounds it. A block without magnitude becomes zeros.

    Args:
        values: fp32 numbers; not all within absmax when it was taken from other values.
        absmax: the largest magnitude of the block, fp32.
        short: is this a last block that is not full?
    """
    if short and absmax != np.float32(0):
        divisor = max(absmax, SMALLEST)
        for i in range(values.size):
            out[i] = values[i] / divisor
    else:
        factor = np.float32(0) if absmax == np.float32(0) else np.float32(1) / max(absmax, SMALLEST)
        for i in range(values.size):
            out[i] = values[i] * factor


@kernel
def rank(values: Any, bounds: Any, ranks: Any) -> None:
    """ranks[i] = number of bounds below values[i]: the rank of the nearest level, the lower one at a midpoint.

    Fifteen compares without a branch, in 32-bit lanes, are faster here than a search.
    """
    b0, b1, b2, b3, b4 = bounds[0], bounds[1], bounds[2], bounds[3], bounds[4]
    b5, b6, b7, b8, b9 = bounds[5], bounds[6], bounds[7], bounds[8], bounds[9]
    b10, b11, b12, b13, b14 = bounds[10], bounds[11], bounds[12], bounds[13], bounds[14]
    one = np.int32(1)
    for i in range(values.size):
        v = values[i]
        low = one * (v > b0) + one * (v > b1) + one * (v > b2) + one * (v > b3) + one * (v > b4)
        middle = one * (v > b5) + one * (v > b6) + one * (v > b7) + one * (v > b8) + one * (v > b9)
        high = one * (v > b10) + one * (v > b11) + one * (v > b12) + one * (v > b13) + one * (v > b14)
        ranks[i] = low + middle + high


@kernel
def nearest(values: Any, bounds: Any, levels: Any, out: Any) -> None:
    """out[i] = the level of values[i]'s rank, by selections: looking levels up would not vectorise.

    values and out must not overlap, or LLVM's vectorised loop is not taken.
    """
    b0, b1, b2, b3, b4 = bounds[0], bounds[1], bounds[2], bounds[3], bounds[4]
    b5, b6, b7, b8, b9 = bounds[5], bounds[6], bounds[7], bounds[8], bounds[9]
    b10, b11, b12, b13, b14 = bounds[10], bounds[11], bounds[12], bounds[13], bounds[14]
    l0, l1, l2, l3, l4, l5 = levels[0], levels[1], levels[2], levels[3], levels[4], levels[5]
    l6, l7, l8, l9, l10 = levels[6], levels[7], levels[8], levels[9], levels[10]
    l11, l12, l13, l14, l15 = levels[11], levels[12], levels[13], levels[14], levels[15]
    for i in range(values.size):
        v = values[i]
        best = l1 if v > b0 else l0
        best = l2 if v > b1 else best
        best = l3 if v > b2 else best
        best = l4 if v > b3 else best
        best = l5 if v > b4 else best
        best = l6 if v > b5 else best
        best = l7 if v > b6 else best
        best = l8 if v > b7 else best
        best = l9 if v > b8 else best
        best = l10 if v > b9 else best
        best = l11 if v > b10 else best
        best = l12 if v > b11 else best
        best = l13 if v > b12 else best
        best = l14 if v > b13 else best
        out[i] = l15 if v > b14 else best


@view_kernel
def pack_pairs(pairs: Any, packed: Any) -> None:
    """packed[i] = first code << 4 | second code, of pairs of codes that were read as numbers of twice the width."""
    four, half = pairs.dtype.type(4), pairs.dtype.type(4 * pairs.itemsize)
    for i in range(packed.size):
        packed[i] = np.uint8(pairs[i] << four) | np.uint8(pairs[i] >> half)
