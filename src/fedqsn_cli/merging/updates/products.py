"""Products of two factors, compiled: in double precision, in one order, rounded once to fp32.

    out[i, j] = scaling · (((0 + left[i, 0] right[0, j]) + left[i, 1] right[1, j]) + ..)

Products and sums are rounded one by one, with k rising, whatever else is computed with an element: not so in BLAS,
whose order depends on the shape of the product and on the processor.

Loads, not arithmetic, would take most of the time. So `BLOCK` columns of the right factor are copied to where they
stay in the first cache for all rows, and `TERMS` terms are added to the sums of two rows at once: for a term of a row,
that is half a load from the right factor, and an eighth of loading and storing a sum.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.kernels.jit import view_kernel

Doubles = NDArray[np.float64]

BLOCK = 192  # columns: 16 rows of them in double precision take 24 KiB
TERMS = 8  # their factors in two rows stay in registers where a processor has 32, as with AVX-512


def product(left: Doubles, right: Doubles, scaling: float) -> NDArray[np.float32]:
    """scaling · left right, [rows, cols]; infinite or NaN where a factor or the result is.

    Args:
        left: [rows, rank]. right: [rank, cols].
    """
    (rows, rank), cols = left.shape, right.shape[1]
    missing = (-rows % 2, -rank % TERMS or TERMS * (rank == 0))
    left = np.ascontiguousarray(np.pad(left, [(0, more) for more in missing]) if any(missing) else left)
    out = np.empty((len(left), cols), np.float32)
    terms, sums = np.zeros(left.shape[1] * BLOCK), np.zeros((3, 2, BLOCK))
    _multiply(left, np.ascontiguousarray(right), scaling, terms, sums, out)
    return out[:rows]


@view_kernel
def _multiply(left: Any, right: Any, scaling: float, terms: Any, sums: Any, out: Any) -> None:
    """Block after block of columns; `terms` and `sums` are room, and zeros at first."""
    rank, cols = right.shape
    for begin in range(0, cols, BLOCK):
        for k in range(rank):
            for i in range(min(BLOCK, cols - begin)):
                terms[k * BLOCK + i] = right[k, begin + i]
        _multiply_block(left, terms, scaling, sums, begin, min(begin + BLOCK, cols), out)


@view_kernel
def _multiply_block(left: Any, terms: Any, scaling: float, sums: Any, begin: int, end: int, out: Any) -> None:
    """Columns begin .. end, two rows at a time.

    Args:
        left: [rows, rank], even and a multiple of `TERMS`. terms: [rank * BLOCK], the right factor's columns.
        sums: [3, 2, BLOCK]; the first ones are zeros, the others take turns, because a loop that writes where it reads
            would not vectorise.
    """
    rows, rank = left.shape
    last, size = rank - TERMS, end - begin
    for row in range(0, rows, 2):
        old = 0
        for k in range(0, last, TERMS):
            new = 2 if old == 1 else 1
            _add_terms(
                *(left[row, k : k + TERMS], left[row + 1, k : k + TERMS], terms[k * BLOCK : (k + TERMS) * BLOCK]),
                *(sums[old, 0, :size], sums[old, 1, :size], 1.0, sums[new, 0, :size], sums[new, 1, :size]),
            )
            old = new
        _add_terms(
            *(left[row, last:], left[row + 1, last:], terms[last * BLOCK :]),
            *(sums[old, 0, :size], sums[old, 1, :size], scaling, out[row, begin:end], out[row + 1, begin:end]),
        )


@view_kernel
def _add_terms(first: Any, second: Any, terms: Any, sum1: Any, sum2: Any, scaling: float, out1: Any, out2: Any) -> None:
    """Add `TERMS` terms to the sums of two rows; what comes out is rounded if `out1` and `out2` are in fp32."""
    for i in range(out1.size):
        x, y = sum1[i], sum2[i]
        for k in range(TERMS):  # unrolled: the loop over i vectorises
            term = terms[k * BLOCK + i]
            x += first[k] * term
            y += second[k] * term
        out1[i], out2[i] = scaling * x, scaling * y
