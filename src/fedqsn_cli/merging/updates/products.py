"""Products of two factors, compiled: in double precision, in one order, rounded once to fp32.

Each element is Σ_k left[i, k] · right[k, j] with k rising, whatever else is computed with it: not so in BLAS, whose
order depends on the shape of the product and on the processor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.kernels.jit import kernel

BLOCK = 512  # columns that are computed together: two rows of sums stay in L1, 16 rows of doubles in L2

Doubles = NDArray[np.float64]


def product(left: Doubles, right: Doubles, scaling: float) -> NDArray[np.float32]:
    """scaling · left right, [rows, cols]; infinite or NaN where a factor or the result is.

    Args:
        left: [rows, rank]. right: [rank, cols].
    """
    out = np.empty((left.shape[0], right.shape[1]), np.float32)
    _multiply(np.ascontiguousarray(left), np.ascontiguousarray(right).reshape(-1), scaling, out)
    return out


@kernel
def _multiply(left: Any, right: Any, scaling: float, out: Any) -> None:
    """Block of columns by block of columns, so that the right factor is read from the cache; two rows at a time."""
    rows, cols = out.shape
    rank = left.shape[1]
    sums, others = np.empty(BLOCK, np.float64), np.empty(BLOCK, np.float64)
    whole = rank - rank % 4
    for start in range(0, cols, BLOCK):
        size = min(BLOCK, cols - start)
        for row in range(0, rows, 2):
            pair = min(row + 1, rows - 1)  # the last row of an odd number is computed twice
            first, second = sums[:size], others[:size]
            first[:], second[:] = 0.0, 0.0
            for k in range(0, whole, 4):
                at = k * cols + start
                _add_four(
                    left[row, k : k + 4], left[pair, k : k + 4], right[at : at + 3 * cols + size], cols, first, second
                )
            for k in range(whole, rank):
                at = k * cols + start
                _add_one(left[row, k], left[pair, k], right[at : at + size], first, second)
            _round(first, scaling, out[row, start : start + size])
            _round(second, scaling, out[pair, start : start + size])


@kernel
def _add_four(factors: Any, others: Any, rows: Any, cols: int, first: Any, second: Any) -> None:
    """Four terms of each sum, one after the other: a sum is loaded and stored once for all of them."""
    a, b, c, d = factors[0], factors[1], factors[2], factors[3]
    e, f, g, h = others[0], others[1], others[2], others[3]
    size = first.size
    one, two = rows[:size], rows[cols : cols + size]
    three, four = rows[2 * cols : 2 * cols + size], rows[3 * cols : 3 * cols + size]
    for i in range(size):
        w, x, y, z = one[i], two[i], three[i], four[i]
        first[i] = (((first[i] + a * w) + b * x) + c * y) + d * z
        second[i] = (((second[i] + e * w) + f * x) + g * y) + h * z


@kernel
def _add_one(factor: float, other: float, row: Any, first: Any, second: Any) -> None:
    for i in range(first.size):
        first[i] += factor * row[i]
        second[i] += other * row[i]


@kernel
def _round(sums: Any, scaling: float, out: Any) -> None:
    for i in range(out.size):
        out[i] = np.float32(scaling * sums[i])
