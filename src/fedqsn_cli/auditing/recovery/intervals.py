"""What an attacker reads out of one proxy: values without their scale, and the intervals that their codes leave."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.artifacts.manifests import Quantization
from fedqsn_cli.auditing.kernels import block_peaks, largest_values, snapped_cells
from fedqsn_cli.auditing.opened_proxy import OpenedProxy
from fedqsn_cli.auditing.stored_rows import StoredRows
from fedqsn_cli.kernels.jit import KIND
from fedqsn_cli.models.tensor_task import TensorTask
from fedqsn_cli.quantization import kernels
from fedqsn_cli.quantization.codebooks import FORMATS, codebook
from fedqsn_cli.quantization.codes4 import decode, pairs_of

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
    zeros = [code for code in range(count) if FORMATS[format].values[code] == 0]  # fp4 has two codes of zero
    low[zeros], high[zeros] = low[zeros].min(), high[zeros].max()
    return np.where(low > -1, low - _SLACK, low), np.where(high < 1, high + _SLACK, high)


def once_rounded(proxy: OpenedProxy, task: TensorTask) -> bool:
    """Is a tensor stored more finely than it was quantized?"""
    tensor = proxy.tensors[task.name]
    return tensor.packing is not None or tensor.dtype == "F32"


def certain_values(proxy: OpenedProxy, task: TensorTask, sent: Floats, values: Floats) -> Floats:
    """Descaled values, NaN where rounding makes them uncertain.

    In 16-bit dense tensors a value was rounded twice: the attacker rounds it once more, and is certain only of values
    that were not quantized, or that attain the scale of their block.

    Args:
        sent: rows as they were sent, [rows, cols]. values: the same, descaled.
    """
    if once_rounded(proxy, task):
        return values
    dtype, quantization = proxy.tensors[task.name].dtype, proxy.manifest.quantization
    if quantization is None or task.layout.kind != "snap":
        return kernels.widened(kernels.narrowed(values, dtype), dtype).reshape(values.shape)
    out, peaks = np.empty_like(sent), _peaks(task, quantization, sent)
    factor = proxy.factor(task.name)
    largest_values(sent.reshape(-1), peaks.reshape(-1), factor, KIND[dtype], out.reshape(-1))
    return out


def _peaks(task: TensorTask, quantization: Quantization, sent: Floats) -> Floats:
    """For each value of a snapped tensor, the largest magnitude in its block: [rows, cols] of whole blocks."""
    geometry, block, peaks = task.layout.geometry, quantization.block_size, np.empty_like(sent)
    if quantization.format == "int8" and geometry != "column":
        block = task.layout.view[2]  # int8 along rows takes one scale a row
    shape = (1, sent.size) if geometry == "flat" else sent.shape
    block_peaks(sent.reshape(shape), block, geometry == "column", peaks.reshape(shape))
    return peaks


def intervals(proxy: OpenedProxy, task: TensorTask, stored: StoredRows, sent: Floats) -> tuple[Floats, Floats]:
    """Where each weight is, by its rounded value: (low, high), [rows, cols], descaled."""
    packing, quantization = stored.packing, proxy.manifest.quantization
    factor = proxy.factor(task.name)
    if packing is not None and packing.kind == "pack4":
        low, high = (
            stored.decoded(partial(decode, block=packing.block, pairs=pairs))
            for pairs in map(pairs_of, cells(packing.format))
        )
        return low / factor, high / factor
    if stored.scales is not None:
        half: Any = stored.scales[:, None] / np.float32(254) * np.float32(1.001)
        return np.asarray((sent - half) / factor, np.float32), np.asarray((sent + half) / factor, np.float32)
    if quantization is None or task.layout.kind == "raw":
        return sent / factor, sent / factor
    low, high = _snapped(sent, _peaks(task, quantization, sent), quantization.format)
    return low / factor, high / factor


def _snapped(sent: Floats, peaks: Floats, format: str) -> tuple[Floats, Floats]:
    """Cells of values that were stored as values: their block's largest one stands for its scale."""
    if format == "int8":
        half = peaks / np.float32(250)
        return sent - half, sent + half
    book = codebook(format)
    count = len(FORMATS[format].values)
    bounds = np.concatenate([[-1], book.bounds[: count - 1], [1]]).astype(np.float32)
    low, high = np.empty_like(sent), np.empty_like(sent)
    snapped_cells(sent.reshape(-1), peaks.reshape(-1), bounds, book.levels, low.reshape(-1), high.reshape(-1))
    return low, high
