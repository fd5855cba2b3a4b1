"""Block scales that are quantized themselves ("double quantization"), bit for bit as bitsandbytes does it on a CPU.

    offset = mean(absmax)        codes, nested_absmax = blocks of 256 of (absmax - offset) against the 8-bit dynamic map

Two details decide the bits. The mean is torch's: eight lanes, four rows and four levels of partial sums. And the
nearest level is looked up in a table of 65,536 cells, so near a midpoint it need not be the nearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.quantization.codebooks import dynamic_map
from fedqsn_cli.quantization.jit import NonFinite, kernel

Bytes = NDArray[np.uint8]
Float32s = NDArray[np.float32]

NESTED_BLOCK = 256
_CELLS = 65535


@dataclass(frozen=True, slots=True)
class DoubleQuantized:
    """Quantized block scales.

    Args:
        codes: uint8 [n], the scales.
        nested_absmax: fp32 [ceil(n / 256)], the scales of the scales.
        nested_map: fp32 [256], the dynamic map.
        offset: the mean of the scales before they were quantized.
    """

    codes: Bytes
    nested_absmax: Float32s
    nested_map: Float32s
    offset: np.float32


def double_quantize(absmax: Float32s) -> DoubleQuantized:
    """Quantize all block scales of one tensor: fp32 [n], n >= 1.

    Raises:
        NonFinite: a scale or their sum is NaN or infinite.
    """
    absmax = np.ascontiguousarray(absmax, dtype=np.float32)
    offset = np.float32(_mean(absmax))
    if not np.isfinite(offset):
        raise NonFinite("a block scale, or the sum of all, is NaN or infinite")
    centred = absmax - offset
    codes = np.empty(absmax.size, np.uint8)
    nested = np.empty(-(-absmax.size // NESTED_BLOCK), np.float32)
    for index, start in enumerate(range(0, absmax.size, NESTED_BLOCK)):
        block = centred[start : start + NESTED_BLOCK]
        nested[index] = np.abs(block).max()
        codes[start : start + NESTED_BLOCK] = _nearest(block, nested[index])
    return DoubleQuantized(codes, nested, dynamic_map(), offset)


def double_dequantize(scales: DoubleQuantized) -> Float32s:
    """The block scales that bitsandbytes computes with: fp32 [n]."""
    each = np.repeat(scales.nested_absmax, NESTED_BLOCK)[: scales.codes.size]
    absmax: Float32s = scales.nested_map[scales.codes] * each + scales.offset
    return absmax


def nearest_codes(absmax: Float32s, scales: DoubleQuantized) -> Bytes:
    """Codes for other block scales, fp32 [n], under the nested scales and the offset that are there already."""
    centred = absmax - scales.offset
    codes = np.empty(absmax.size, np.uint8)
    for index, start in enumerate(range(0, absmax.size, NESTED_BLOCK)):
        block = slice(start, start + NESTED_BLOCK)
        codes[block] = _nearest(centred[block], scales.nested_absmax[index])
    return codes


def _nearest(block: Float32s, absmax: np.float32) -> Bytes:
    """Codes of one block. A block of zeros gets code 0, whose level is not zero: its scale is."""
    if absmax == 0:
        return np.zeros(block.size, np.uint8)
    with np.errstate(over="ignore", invalid="ignore"):
        y = np.clip(block * (np.float32(1) / absmax), np.float32(-1), np.float32(1))
    half = (np.float32(1) + y) * np.float32(0.5)
    cells = (half.astype(np.float64) * _CELLS + 0.5).astype(np.float32)  # exact in fp64, so rounded once, like an fma
    cells[np.isnan(cells)] = 0  # 0 times an infinite reciprocal
    codes: Bytes = _table()[cells.astype(np.uint16)]
    return codes


@cache
def _table() -> Bytes:
    """For each of the 65,536 cells of [-1, 1] the code of the level nearest to the cell's centre."""
    levels = dynamic_map()
    bounds = (levels[:-1] + levels[1:]) * np.float32(0.5)
    cell = np.arange(_CELLS + 1, dtype=np.float32)
    centres = (cell + cell) / np.float32(_CELLS) - np.float32(1)
    return np.searchsorted(bounds, centres, side="left").astype(np.uint8)


@kernel
def _mean(x: Any) -> Any:
    """torch.mean of fp32 numbers, in the order in which torch adds on a CPU with 256-bit vectors and one thread."""
    lanes = 8 if x.size >= 8 else 1
    width = 4 * lanes
    count = x.size // width
    sums = np.zeros(4 * width, np.float32)
    _cascade(x, count, width, sums)
    for i in range(count * width, x.size // lanes * lanes):
        sums[i % lanes] += x[i]
    for k in range(lanes, width):
        sums[k % lanes] += sums[k]
    total = np.float32(0)
    for i in range(x.size // lanes * lanes, x.size):
        total += x[i]
    for lane in range(lanes):
        total += sums[lane]
    return total / np.float32(x.size)


@kernel
def _cascade(x: Any, count: int, width: int, sums: Any) -> None:
    """sums[:width] = column sums of x[: count * width] seen as [count, width], in four levels that take over in turn."""
    digits = 0
    while count > 1 and (count - 1) >> digits:
        digits += 1
    power = max(4, digits // 4)
    for i in range(count):
        for k in range(width):
            sums[k] += x[i * width + k]
        for level in range(1, 4):
            if (i + 1) % (1 << power * level):
                break
            for k in range(level * width, (level + 1) * width):
                sums[k] += sums[k - width]
                sums[k - width] = 0
    for k in range(width, 4 * width):
        sums[k % width] += sums[k]
