"""Block scales that are quantized themselves ("double quantization"), bit for bit as bitsandbytes does it on a CPU.

    offset = mean(absmax)        codes, nested_absmax = blocks of 256 of (absmax - offset) against the 8-bit dynamic map

Two details decide the bits. The mean is torch's: eight lanes, four rows and four levels of partial sums. And the
nearest level is looked up in a table of 65,536 cells, so near a midpoint it need not be the nearest.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.kernels.floats import writable
from fedqsn_cli.kernels.jit import NonFinite, kernel
from fedqsn_cli.quantization.blocks import largest
from fedqsn_cli.quantization.codebooks import dynamic_map
from fedqsn_cli.quantization.nested_scales import NESTED_BLOCK, DoubleQuantized

Bytes = NDArray[np.uint8]
Float32s = NDArray[np.float32]

_CELLS = 65535


def double_quantize(absmax: Float32s) -> DoubleQuantized:
    """Quantize all block scales of one tensor: fp32 [n], n >= 1.

    Raises:
        NonFinite: a scale or their sum is NaN or infinite.
    """
    absmax = writable(np.ascontiguousarray(absmax, dtype=np.float32))
    offset = np.float32(_mean(absmax))
    if not np.isfinite(offset):
        raise NonFinite("a block scale, or the sum of all, is NaN or infinite")
    codes = np.empty(absmax.size, np.uint8)
    nested = np.empty(-(-absmax.size // NESTED_BLOCK), np.float32)
    _nearest(absmax - offset, nested, False, _table(), codes)
    return DoubleQuantized(codes, nested, dynamic_map(), offset)


def nearest_codes(absmax: Float32s, scales: DoubleQuantized) -> Bytes:
    """Codes for other block scales, fp32 [n], under the nested scales and the offset that are there already."""
    codes = np.empty(absmax.size, np.uint8)
    _nearest(absmax - scales.offset, writable(scales.nested_absmax), True, _table(), codes)
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
def _nearest(centred: Any, nested: Any, given: bool, table: Any, codes: Any) -> None:
    """Codes of all blocks; a block of zeros gets code 0, whose level is not zero: its scale is."""
    for start in range(0, centred.size, NESTED_BLOCK):
        part, target = centred[start : start + NESTED_BLOCK], codes[start : start + NESTED_BLOCK]
        if not given:
            nested[start // NESTED_BLOCK] = largest(part)
        factor = np.float32(1) / nested[start // NESTED_BLOCK]
        for i in range(part.size):
            y = part[i] * factor
            y = y if y >= np.float32(-1) else np.float32(-1)  # NaN, too: 0 times an infinite reciprocal
            y = min(y, np.float32(1))
            half = (np.float32(1) + y) * np.float32(0.5)
            cell = np.float32(np.float64(half) * 65535.0 + 0.5)  # exact in fp64, so rounded once, like an fma
            target[i] = table[np.uint16(cell)]


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
    """sums[:width] = column sums of x[: count * width] as [count, width], in four levels that take over in turn."""
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
