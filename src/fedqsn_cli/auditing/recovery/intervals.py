"""What an attacker reads out of one proxy: values without their scale, and the intervals that they stand for."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.auditing.inputs import OpenedProxy
from fedqsn_cli.auditing.kernels import decode_levels, drop_below_peak
from fedqsn_cli.auditing.recovery.attacks import block_peaks
from fedqsn_cli.models.tensor_task import TensorTask
from fedqsn_cli.quantization import kernels
from fedqsn_cli.quantization.codebooks import FORMATS, codebook

Floats = NDArray[np.float32]

_SLACK = np.float32(1e-5)  # intervals are widened by this much of a block's scale: rounding must not make them empty


@cache
def cells(format: str) -> tuple[Floats, Floats]:
    """For each code, the ends of the cell of values / absmax that is rounded to it: fp32 [16] each."""
    book = codebook(format)
    count = len(FORMATS[format].values)
    bounds = np.concatenate([[-1], book.bounds[: count - 1], [1]]).astype(np.float32)
    low, high = np.zeros(16, np.float32), np.zeros(16, np.float32)
    low[book.order[:count]], high[book.order[:count]] = bounds[:-1], bounds[1:]
    twins = [code for code in range(count) if FORMATS[format].values[code] == 0]  # fp4 has two codes of zero
    low[twins], high[twins] = low[twins].min(), high[twins].max()
    return np.where(low > -1, low - _SLACK, low), np.where(high < 1, high + _SLACK, high)


def read_values(proxy: OpenedProxy, task: TensorTask, first: int, rows: int) -> Floats:
    """Rows as they were sent, of the flow's working view (raw tensors: their stored view)."""
    return proxy.values(task.name, task.layout, first, rows)


def exact_guess(proxy: OpenedProxy, task: TensorTask, sent: Floats) -> tuple[Floats, Floats]:
    """Descaled values, and the same with NaN where rounding makes them uncertain.

    In 16-bit dense tensors a value was rounded twice: the attacker rounds it once more, and is certain only of values
    that were not quantized, or that attain the scale of their block.
    """
    values = sent / proxy.factor(task.name)
    logical = proxy.tensors[task.name]
    if logical.packing is not None or logical.dtype == "F32":
        return values, values
    rounded = kernels.widened(kernels.narrowed(values, logical.dtype), logical.dtype).reshape(values.shape)
    how = proxy.manifest.quantization
    if how is None or task.layout.kind != "snap":
        return values, rounded
    block = row_block(task, how.format, how.block_size)
    if task.layout.geometry == "flat":
        drop_below_peak(sent.reshape(1, -1), block, False, rounded.reshape(1, -1))
    else:
        drop_below_peak(sent, block, task.layout.geometry == "column", rounded)
    return values, rounded


def row_block(task: TensorTask, format: str, block: int) -> int:
    """Values a scale of a snapped tensor; int8 along rows takes one a row."""
    if format == "int8" and task.layout.geometry != "column":
        return task.layout.view[2]
    return block


def intervals(proxy: OpenedProxy, task: TensorTask, first: int, rows: int, sent: Floats) -> tuple[Floats, Floats]:
    """Where each weight lies, by its rounded value: (low, high), [rows, cols], descaled."""
    packing, how = proxy.tensors[task.name].packing, proxy.manifest.quantization
    factor = proxy.factor(task.name)
    if packing is not None and packing.kind == "pack4":
        ends = _packed(proxy, task, first, rows, cells(packing.format))
        return ends[0] / factor, ends[1] / factor
    if packing is not None:
        half: Any = proxy.scales(task.name, first, rows)[:, None] / np.float32(254) * np.float32(1.001)
        return np.asarray((sent - half) / factor, np.float32), np.asarray((sent + half) / factor, np.float32)
    if how is None or task.layout.kind == "raw":
        return sent / factor, sent / factor
    peaks = block_peaks(sent, task.layout.geometry, row_block(task, how.format, how.block_size))
    low, high = _snapped(sent, peaks, how.format)
    return low / factor, high / factor


def _packed(
    proxy: OpenedProxy, task: TensorTask, first: int, rows: int, ends: tuple[Floats, Floats]
) -> tuple[Floats, Floats]:
    packing = proxy.tensors[task.name].packing
    assert packing is not None
    cols, block = task.layout.view[2], packing.block
    start = first * cols
    lower = start // block * block
    size = start - lower + rows * cols
    codes, scales = proxy.codes(task.name, lower, size), proxy.scales(task.name, lower // block, -(-size // block))
    out = []
    for table in ends:
        flat = np.empty(size, np.float32)
        decode_levels(codes, scales, block, table, flat)
        out.append(flat[start - lower :].reshape(rows, cols))
    return out[0], out[1]


def _snapped(sent: Floats, peaks: Floats, format: str) -> tuple[Floats, Floats]:
    """Cells of values that were stored as values: their block's largest one stands for its scale."""
    if format == "int8":
        half = peaks / np.float32(250)
        return sent - half, sent + half
    book = codebook(format)
    count = len(FORMATS[format].values)
    with np.errstate(divide="ignore", invalid="ignore"):
        share: Any = np.where(peaks > 0, sent / peaks, 0)
    rank = np.searchsorted(book.bounds[: count - 1], share)
    bounds = np.concatenate([[-1], book.bounds[: count - 1], [1]]).astype(np.float32)
    off = np.abs(share - book.levels[rank]) > 0.02  # the scale is not in sight: its element is hidden
    low = np.where(off, -np.inf, (bounds[rank] - np.float32(0.01)) * peaks)
    high = np.where(off, np.inf, (bounds[rank + 1] + np.float32(0.01)) * peaks)
    return low.astype(np.float32), high.astype(np.float32)
