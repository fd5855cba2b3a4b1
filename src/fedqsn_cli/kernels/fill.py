"""Stored values with zeros, or other values, where a unit is hidden. The dtype does not matter: bits are moved."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.kernels.jit import kernel
from fedqsn_cli.kernels.threads import run_ranges

Array = NDArray[Any]
Bools = NDArray[np.bool_]

GRAIN = 1 << 17
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # by bytes of an element


def fill_rows(x: Array, hidden: Bools, source: Array | None) -> None:
    """Put zeros, or the rows of `source`, into the hidden rows of x ([rows, cols], in place); hidden is [rows]."""
    target, other = _bits(x), _bits(x if source is None else source)

    def work(start: int, stop: int) -> None:
        _rows(target[start:stop], hidden[start:stop], other[start:stop], source is not None)

    run_ranges(len(x), max(1, GRAIN // max(x.shape[1], 1)), work)


def fill_columns(x: Array, hidden: Bools, source: Array | None) -> None:
    """The same for columns; hidden is [cols]."""
    target, other = _bits(x), _bits(x if source is None else source)
    keep = np.where(hidden, target.dtype.type(0), ~target.dtype.type(0))

    def work(start: int, stop: int) -> None:
        _columns(target[start:stop], keep, other[start:stop], source is not None)

    run_ranges(len(x), max(1, GRAIN // max(x.shape[1], 1)), work)


def fill_elements(x: Array, hidden: Bools, source: Array | None) -> None:
    """The same for single elements; hidden is [rows, cols]."""
    target, flags = _bits(x).reshape(-1), np.ascontiguousarray(hidden).reshape(-1)
    other, zero = _bits(x if source is None else source).reshape(-1), target.dtype.type(0)

    def work(start: int, stop: int) -> None:
        _elements(target[start:stop], flags[start:stop], other[start:stop], source is not None, zero)

    run_ranges(target.size, GRAIN, work)


def _bits(x: Array) -> Array:
    """The same memory as unsigned integers. Raises ValueError: not in C order, or of another width."""
    if not x.flags.c_contiguous:
        raise ValueError("the array is not in C order")
    return x.view(BITS[x.itemsize])


@kernel
def _rows(x: Any, hidden: Any, source: Any, filled: bool) -> None:
    for row in range(x.shape[0]):
        if not hidden[row]:
            continue
        line, other = x[row], source[row]
        if filled:
            for i in range(line.size):
                line[i] = other[i]
        else:
            line[:] = 0  # not one expression: of 0 and uint64 numba would make float64


@kernel
def _columns(x: Any, keep: Any, source: Any, filled: bool) -> None:
    for row in range(x.shape[0]):
        line = x[row]
        if filled:
            other = source[row]
            for i in range(line.size):
                line[i] = (line[i] & keep[i]) | (other[i] & ~keep[i])
        else:
            for i in range(line.size):
                line[i] = line[i] & keep[i]


@kernel
def _elements(x: Any, hidden: Any, source: Any, filled: bool, zero: Any) -> None:
    if filled:
        for i in range(x.size):
            x[i] = source[i] if hidden[i] else x[i]
    else:
        for i in range(x.size):
            x[i] = zero if hidden[i] else x[i]  # of x's own type: of 0 and uint64 numba would make float64
