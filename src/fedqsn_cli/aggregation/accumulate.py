"""The arithmetic of merging, compiled: one pass over memory each.

Sums run in double precision in the order of the updates and are rounded once, to fp32 and from there to the model's
dtype (to nearest, ties to even), so a result depends neither on chunk size nor on the number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.quantization.jit import (
    BF16,
    F32,
    as_bits,
    kernel,
    narrow_brain,
    narrow_half,
    to_bits,
    to_float,
    widen,
    widen_half,
)
from fedqsn_cli.quantization.kernels import narrowed, widened
from fedqsn_cli.quantization.threads import run_ranges
from fedqsn_cli.units import Axis

Array = NDArray[Any]
MODES = {None: 0, "row": 1, "column": 2, "element": 3}


def add(total: Array, u: Array, dtype: str, index: NDArray[np.int64], axis: Axis | None, coefficient: float) -> float:
    """total += coefficient * U on the elements that U holds.

    Args:
        total: float64 [rows, cols].
        u: stored bits of U for these rows: [seen rows * cols], [rows * seen columns] or [seen elements].
        index: the seen rows, columns or elements; unused when the tensor has no units.

    Returns:
        Sum of squares of U; NaN or infinite if an element of U is.
    """
    bits, kind = as_bits(u, dtype)
    rows, cols = total.shape
    parts = {None: rows, "row": index.size, "column": rows, "element": index.size}[axis]
    width = max(1, u.size // max(1, parts))
    squares: list[float] = []

    def part(start: int, stop: int) -> None:
        wide = np.empty((stop - start) * width, np.uint32)
        widen(bits[start * width : stop * width], kind, wide)
        squares.append(float(_add(total, wide.view(np.float32), index, MODES[axis], start, stop, width, coefficient)))

    run_ranges(parts, max(1, 65536 // width), part)
    return sum(squares)


@kernel
def _add(total: Any, u: Any, index: Any, mode: int, start: int, stop: int, width: int, coefficient: float) -> float:
    squares = 0.0
    flat = total.reshape(-1)
    cols = total.shape[1]
    for part in range(start, stop):
        at = (part - start) * width
        if mode == 2:
            for j in range(width):
                x = np.float64(u[at + j])
                squares += x * x
                flat[part * cols + index[j]] += coefficient * x
        elif mode == 3:
            x = np.float64(u[at])
            squares += x * x
            flat[index[part]] += coefficient * x
        else:
            begin = (index[part] if mode == 1 else part) * cols
            for j in range(width):
                x = np.float64(u[at + j])
                squares += x * x
                flat[begin + j] += coefficient * x
    return squares


def step(
    w: Array, residual: Array | None, dtype: str, total: Array, weights: Array, axis: Axis | None, rate: float
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
    rest = np.zeros(1, np.uint16) if residual is None else residual.reshape(-1)
    bad: list[int] = []

    def part(start: int, stop: int) -> None:
        bad.append(int(_step(bits, rest, kind, total.reshape(-1), weights, MODES[axis], cols, start, stop, rate)))

    run_ranges(rows, max(1, 65536 // max(1, cols)), part)
    return sum(bad)


@kernel
def _step(
    w: Any, residual: Any, kind: int, total: Any, weights: Any, mode: int, cols: int, start: int, stop: int, rate: float
) -> int:
    bad = 0
    for row in range(start, stop):
        for column in range(cols):
            i = row * cols + column
            at = row if mode == 1 else column if mode == 2 else i if mode == 3 else 0
            weight = weights[at]
            if weight == 0.0:
                continue
            move = rate * total[i] / weight
            if move == 0.0:
                continue
            if kind == F32:
                new = np.float32(np.float64(to_float(w[i])) + move)
                w[i] = to_bits(new)
            else:
                old = to_float(np.uint32(w[i]) << np.uint32(16)) if kind == BF16 else to_float(widen_half(w[i]))
                kept = to_float(np.uint32(residual[i]) << np.uint32(16))
                new = np.float32(np.float64(old) + np.float64(kept) + move)
                rounded = narrow_brain(to_bits(new)) if kind == BF16 else narrow_half(to_bits(new))
                w[i] = rounded
                wide = to_float(np.uint32(rounded) << np.uint32(16)) if kind == BF16 else to_float(widen_half(rounded))
                residual[i] = narrow_brain(to_bits(new - wide))
                new = wide
            if not np.isfinite(new):
                bad += 1
    return bad


def sum_of_squares(x: Array, dtype: str) -> float:
    """Sum of squares of stored floats."""
    values = widened(x, dtype)
    return float(np.dot(values, values))


def mix(a: Array, x: float, b: Array, y: float, dtype: str) -> Array:
    """x * a + y * b of stored floats, in double precision, rounded to fp32 and then to the dtype; fresh array."""
    first, second = (widened(part, dtype).astype(np.float64) for part in (a, b))
    with np.errstate(invalid="ignore", over="ignore"):
        result = (x * first + y * second).astype(np.float32)
    return narrowed(result, dtype).reshape(a.shape)
