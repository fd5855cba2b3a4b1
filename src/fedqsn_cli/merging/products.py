"""Products of two factors, compiled: in double precision, in one order, rounded once to fp32.

Each element is Σ_k left[i, k] · right[k, j] with k rising, whatever else is computed with it: not so in BLAS, whose
order depends on the shape of the product and on the processor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.kernels.jit import kernel

BLOCK = 256  # columns that are computed together: those of 16 rows of doubles fit in L1

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
    """Block of columns by block of columns, so that the right factor is read from the cache."""
    rows, cols = out.shape
    rank, sums = left.shape[1], np.empty(BLOCK, np.float64)
    whole = rank - rank % 4
    for start in range(0, cols, BLOCK):
        size = min(BLOCK, cols - start)
        for row in range(rows):
            line, factors = sums[:size], left[row]
            line[:] = 0.0
            for k in range(0, whole, 4):
                at = k * cols + start
                _add_four(factors[k : k + 4], right[at : at + 3 * cols + size], cols, line)
            for k in range(whole, rank):
                at = k * cols + start
                _add_one(factors[k], right[at : at + size], line)
            target = out[row, start : start + size]
            for i in range(size):
                target[i] = np.float32(scaling * line[i])


@kernel
def _add_four(factors: Any, rows: Any, cols: int, line: Any) -> None:
    """Four terms of each sum, one after the other: a sum is loaded and stored once for all of them."""
    a, b, c, d = factors[0], factors[1], factors[2], factors[3]
    size = line.size
    first, second = rows[:size], rows[cols : cols + size]
    third, fourth = rows[2 * cols : 2 * cols + size], rows[3 * cols : 3 * cols + size]
    for i in range(size):
        line[i] = (((line[i] + a * first[i]) + b * second[i]) + c * third[i]) + d * fourth[i]


@kernel
def _add_one(factor: float, row: Any, line: Any) -> None:
    for i in range(line.size):
        line[i] += factor * row[i]
