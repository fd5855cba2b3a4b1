"""How an update points in comparison with the merged step: the cosine, over what the client saw.

Of up to `KEPT` updates it is exact. Of more, it is measured on the first rows of every chunk, so that memory stays
what it is for `KEPT` of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.kernels.jit import as_bits, kernel, widen
from fedqsn_cli.kernels.threads import run_ranges
from fedqsn_cli.merging.sums.arithmetic import COLUMNS, ELEMENTS, GRAIN, PIECE, ROWS, STRIPE, parts_of
from fedqsn_cli.merging.updates.read_update import UpdateChunk, UpdateReader
from fedqsn_cli.merging.updates.stored_values import ReadValues
from fedqsn_cli.planning.tensor_plan import TensorPlan, UnitAxis

KEPT = 8

Doubles = NDArray[np.float64]


def first_rows(piece: UpdateChunk, axis: UnitAxis | None, keep: int, rows: int, cols: int) -> UpdateChunk:
    """The elements of a piece of U in the first `keep` of its rows, in memory of their own if that is not all."""
    if keep >= rows:
        return piece
    index, read = piece.part.index, piece.read
    if axis == "column":
        count = read.values.size // rows * keep
    elif axis is None:
        count = keep * cols
    else:
        index = index[: np.searchsorted(index, keep if axis == "row" else keep * cols)]
        count = index.size * (cols if axis == "row" else 1)
    part = replace(piece.part, rows=keep, count=count, index=index)
    return UpdateChunk(part, ReadValues(read.values[:count].copy(), read.dtype, ()))


def compare(mean: Doubles, tensor: TensorPlan, reader: UpdateReader, piece: UpdateChunk) -> None:
    """Add the products of Δ_k and the merged step to what is measured of an update; `mean` holds that step's rows."""
    read, axis = piece.read, reader.update.axis(tensor)
    bits, kind = as_bits(read.values, read.dtype)
    rows, cols = mean.shape
    mode, width, parts = parts_of(bits.size, axis, rows, cols)
    sums, flat, index = np.zeros((-(-parts // STRIPE), 3)), mean.reshape(-1), piece.part.index

    def work(start: int, stop: int) -> None:
        _products(flat, cols, bits, kind, index, mode, width, start, stop, sums)

    run_ranges(parts, STRIPE * -(-GRAIN // (STRIPE * max(width, 1))), work)
    dot, own, merged = sums.sum(axis=0)
    reader.measures.compare(float(own), float(dot), float(merged), scale=reader.update.scale(tensor))


@kernel
def _products(
    mean: Any,
    cols: int,
    u: Any,
    kind: int,
    index: Any,
    mode: int,
    width: int,
    start: int,
    stop: int,
    sums: Any,
) -> None:
    """Σ u m, Σ u² and Σ m² of parts start .. stop of U, `width` values each; one sum for each stripe of parts."""
    bits, step = np.empty(PIECE, np.uint32), np.empty(PIECE, np.float64)
    dots, owns, means = np.empty(PIECE, np.float64), np.empty(PIECE, np.float64), np.empty(PIECE, np.float64)
    values = bits.view(np.float32)
    for part in range(start, stop):
        if part % STRIPE == 0:
            dots[:], owns[:], means[:] = 0.0, 0.0, 0.0
        first, end = part * width, min((part + 1) * width, u.size)
        for at in range(first, end, PIECE):
            count = min(PIECE, end - at)
            widen(u[at : at + count], kind, bits)
            inside = at - first
            if mode == COLUMNS:
                _gather(mean[part * cols : (part + 1) * cols], index[inside : inside + count], step)
                _multiply(values[:count], step, dots, owns, means)
            elif mode == ELEMENTS:
                _gather(mean, index[at : at + count], step)
                _multiply(values[:count], step, dots, owns, means)
            else:
                begin = (index[part] * cols if mode == ROWS else first) + inside
                _multiply(values[:count], mean[begin : begin + count], dots, owns, means)
        if (part + 1) % STRIPE == 0 or part + 1 == stop:
            sums[part // STRIPE, 0] = _total(dots)
            sums[part // STRIPE, 1] = _total(owns)
            sums[part // STRIPE, 2] = _total(means)


@kernel
def _total(values: Any) -> Any:
    """Their sum, from the first to the last, without numba's `sum`, with which loading a kernel imports scipy."""
    result = values[0]
    for i in range(1, values.size):
        result += values[i]
    return result


@kernel
def _multiply(values: Any, step: Any, dots: Any, owns: Any, means: Any) -> None:
    """Add the products to a sum for each place: an array each, so that all three vectorise."""
    for i in range(values.size):
        x, m = np.float64(values[i]), step[i]
        dots[i] += x * m
        owns[i] += x * x
        means[i] += m * m


@kernel
def _gather(source: Any, index: Any, out: Any) -> None:
    for i in range(index.size):
        out[i] = source[index[i]]
