"""The step of a merge, compiled: W' = W + η Δ, in double precision, rounded once to fp32 and from there to the dtype.

What rounding to a 16-bit dtype drops goes into the residual, so small steps of many rounds add up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.kernels.jit import (
    INFINITY,
    MAGNITUDE,
    as_bits,
    kernel,
    narrow,
    narrow_bf16,
    to_bits,
    to_float,
    view_kernel,
    widen,
)
from fedqsn_cli.kernels.threads import run_ranges
from fedqsn_cli.merging.sums.arithmetic import ELEMENTS, FLAT, GRAIN, MODES, PIECE, ROWS, RUN
from fedqsn_cli.planning.tensor_plan import UnitAxis

Array = NDArray[Any]

_ALL = np.uint32(0xFFFFFFFF)


def step(
    w: Array, residual: Array | None, dtype: str, total: Array, weights: Array, axis: UnitAxis | None, rate: float
) -> int:
    """w + residual += rate * total / weights, in place; what rounding drops goes into the residual.

    An element whose step is zero keeps its bits, and so does its residual.

    Args:
        w: stored bits [rows, cols]. residual: BF16 bits [rows, cols] of 16-bit models, else None.
        total: float64 [rows, cols]. weights: float64, one for each row, column or element, or [1]; 0 means unseen.

    Returns:
        How many elements became infinite or NaN.
    """
    rows, cols = total.shape
    bits, kind = as_bits(w, dtype)
    kept = np.zeros(0, np.uint16) if residual is None else residual.reshape(-1)
    mode = ELEMENTS if axis == "row" and cols == 1 else MODES[axis]
    width = RUN if mode in {FLAT, ELEMENTS} else cols
    parts = -(-total.size // max(width, 1))
    bad = np.zeros(parts, np.int64)

    def work(start: int, stop: int) -> None:
        _step(bits, kept, kind, total.reshape(-1), weights, mode, width, start, stop, rate, bad)

    run_ranges(parts, max(1, GRAIN // max(width, 1)), work)
    return int(bad.sum())


@kernel
def _step(
    w: Any,
    residual: Any,
    kind: int,
    total: Any,
    weights: Any,
    mode: int,
    width: int,
    start: int,
    stop: int,
    rate: float,
    bad: Any,
) -> None:
    """Parts start .. stop of the tensor, `width` values each; `bad` counts those of each part that are not finite."""
    divisors, moves, room = np.empty(PIECE), np.empty(PIECE), np.empty((4, PIECE), np.uint32)
    for part in range(start, stop):
        first, end = part * width, min((part + 1) * width, w.size)
        for at in range(first, end, PIECE):
            size = min(PIECE, end - at)
            if mode in (FLAT, ROWS):
                spread_divisors(weights[part : part + 1] if mode == ROWS else weights, divisors[:size])
            else:
                begin = at if mode == ELEMENTS else at - first
                spread_divisors(weights[begin : begin + size], divisors[:size])
            divide(total[at : at + size], divisors, rate, moves)
            bad[part] += move(w[at : at + size], residual[at : at + size], kind, moves, room)


@view_kernel
def spread_divisors(weights: Any, divisors: Any) -> None:
    """One weight for each divisor, or one for all; infinity for 0: units that no client saw do not move."""
    if weights.size == 1:
        divisors[:] = weights[0] if weights[0] != 0.0 else np.inf
    else:
        for i in range(divisors.size):
            divisors[i] = weights[i] if weights[i] != 0.0 else np.inf


@view_kernel
def divide(total: Any, divisors: Any, rate: float, moves: Any) -> None:
    """moves[: len(total)] = rate * total / divisors."""
    for i in range(total.size):
        moves[i] = rate * total[i] / divisors[i]


@view_kernel
def move(w: Any, residual: Any, kind: int, moves: Any, room: Any) -> int:
    """w + residual += moves, in place; what does not move keeps its bits, and its residual.

    Args:
        residual: of the same size, or nothing. moves: of that size at least. room: four rows as long as `moves`.

    Returns:
        How many that moved are not finite.
    """
    old, new, moved, rounded = room[0, : w.size], room[1, : w.size], room[2, : w.size], room[3, : w.size]
    widen(w, kind, old)
    _add_moves(old.view(np.float32), residual, moves, new.view(np.float32))
    _which_move(moves, moved)
    narrow(new, kind, rounded)
    widen(rounded, kind, old)  # what is stored now
    _replace(w, rounded, moved)
    _keep_rest(residual, new.view(np.float32), old.view(np.float32), moved)
    return _count_bad(old, moved)


@view_kernel
def _add_moves(old: Any, residual: Any, moves: Any, new: Any) -> None:
    if residual.size:
        for i in range(new.size):
            kept = to_float(np.uint32(residual[i]) << np.uint32(16))
            new[i] = np.float32(np.float64(old[i]) + np.float64(kept) + moves[i])
    else:
        for i in range(new.size):
            new[i] = np.float32(np.float64(old[i]) + moves[i])


@view_kernel
def _which_move(moves: Any, moved: Any) -> None:
    """All ones where a step is not zero."""
    for i in range(moved.size):
        moved[i] = _ALL if moves[i] != 0.0 else np.uint32(0)


@view_kernel
def _replace(bits: Any, others: Any, mask: Any) -> None:
    """Put other bits where the mask is all ones; a conditional store would not vectorise."""
    for i in range(bits.size):
        bits[i] = bits[i] ^ ((bits[i] ^ others[i]) & mask[i])


@view_kernel
def _keep_rest(residual: Any, new: Any, stored: Any, moved: Any) -> None:
    """What rounding dropped."""
    for i in range(residual.size):
        dropped = narrow_bf16(to_bits(new[i] - stored[i]))
        residual[i] = residual[i] ^ ((residual[i] ^ dropped) & moved[i])


@view_kernel
def _count_bad(stored: Any, moved: Any) -> int:
    bad = 0
    for i in range(stored.size):
        bad += int((stored[i] & moved[i] & MAGNITUDE) >= INFINITY)
    return bad
