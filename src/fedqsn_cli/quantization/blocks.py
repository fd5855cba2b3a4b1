"""One block of fp32 values against a codebook: what packing and snapping share.

bitsandbytes (backends/default/ops.py) treats a last, shorter block differently: it divides by absmax where full blocks
are multiplied by its reciprocal, and the absmax that it stores is at least 1e-38.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedqsn_cli.quantization.jit import kernel, to_bits, to_float

SMALLEST = np.float32(1e-38)


@kernel
def normalize(values: Any, absmax: Any, short: bool) -> None:
    """values / absmax in place, as bitsandbytes rounds it. A block without magnitude becomes zeros.

    Args:
        values: fp32 numbers; not all within absmax when it was taken from other values.
        absmax: the largest magnitude of the block, fp32.
        short: is this a last block that is not full?
    """
    if absmax == np.float32(0):
        values[:] = np.float32(0)
    elif short:
        divisor = max(absmax, SMALLEST)
        for i in range(values.size):
            values[i] = values[i] / divisor
    else:
        factor = np.float32(1) / max(absmax, SMALLEST)
        for i in range(values.size):
            values[i] = values[i] * factor


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
def scaled_levels(levels: Any, absmax: Any, table: Any) -> None:
    """table[r] = bits of levels[r] * absmax in fp32."""
    for i in range(levels.size):
        table[i] = to_bits(levels[i] * absmax)


@kernel
def stored_absmax(bits: Any, short: bool) -> Any:
    """The absmax that is kept for a block whose largest magnitude has these bits."""
    absmax = to_float(bits)
    return max(absmax, SMALLEST) if short else absmax
