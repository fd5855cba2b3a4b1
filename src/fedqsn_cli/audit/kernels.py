"""Compiled arithmetic of the audit. Sums of squares may be added in any order here: nothing is written from them."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedqsn_cli.quantization.jit import F, kernel


def loose(function: F) -> F:
    """Compile with reordered sums, which the compiler needs to add several numbers at once."""
    import numba

    options = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
    try:
        compiled: F = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no directory for its cache
        compiled = numba.njit(**options)(function)
    return compiled


@kernel
def nonzero_codes(packed: Any, start: int, cols: int, row_flags: Any, col_flags: Any, zero: int) -> int:
    """How many hidden elements of rows of packed 4-bit codes do not have the code of zero.

    Args:
        packed: codes of whole rows. start: 1 if the first code is in the low half of the first byte.
        row_flags: [rows], col_flags: [cols] True where visible; an element is visible if both are.
    """
    count = 0
    for row in range(row_flags.size):
        shown = row_flags[row]
        base = row * cols + start
        for col in range(cols):
            if shown and col_flags[col]:
                continue
            at = base + col
            byte = np.int64(packed[at // 2])
            code = byte & 15 if at % 2 else byte >> 4
            count += code != zero
    return count


@kernel
def attained(packed: Any, count: int, block: int, top: Any, out: Any) -> None:
    """out[b] = does a code of block b stand for the level of largest magnitude?

    Args:
        packed: codes of whole blocks. count: number of codes. top: [16] flags of those codes.
    """
    for index in range(out.size):
        found = False
        for at in range(index * block, min((index + 1) * block, count)):
            byte = np.int64(packed[at // 2])
            found |= top[byte & 15 if at % 2 else byte >> 4]
        out[index] = found


@loose
def compare(w: Any, guess: Any, row_flags: Any, col_flags: Any, tolerance: Any, out: Any) -> None:
    """Add to out what a guess is worth on the visible elements of rows.

    Args:
        w, guess: [rows, cols] fp32. row_flags: bool [rows], col_flags: fp32 [cols] 1 where visible.
        tolerance: relative; a guess within it counts as exact.
        out: [6] sums over visible elements: count, w², guess², (w - guess)², exact ones, guess.
    """
    for row in range(w.shape[0]):
        if not row_flags[row]:
            continue
        ww = gg = dd = gs = np.float32(0)
        n = exact = np.float32(0)
        for col in range(w.shape[1]):
            on = col_flags[col]
            a = w[row, col] * on
            b = guess[row, col] * on
            d = a - b
            ww += a * a
            gg += b * b
            dd += d * d
            gs += b
            n += on
            exact += on if abs(d) <= tolerance * abs(a) else np.float32(0)
        out[0] += n
        out[1] += ww
        out[2] += gg
        out[3] += dd
        out[4] += exact
        out[5] += gs
