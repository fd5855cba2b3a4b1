"""nf4 and fp4 codes, two a byte, bit for bit as bitsandbytes quantizes on a CPU.

    packed[i] = code(x[2 i]) << 4 | code(x[2 i + 1])        absmax[b] = max |x| of block b
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.quantization.blocks import normalize, rank, scaled_levels, stored_absmax
from fedqsn_cli.quantization.codebooks import BLOCK_SIZES, FORMATS, Codebook, codebook
from fedqsn_cli.quantization.jit import INFINITY, NonFinite, as_bits, kernel, largest, narrow, widen
from fedqsn_cli.quantization.threads import run_ranges

Bytes = NDArray[np.uint8]
Float32s = NDArray[np.float32]

GRAIN = 512  # blocks that are worth a thread
BATCH = 1024  # values that go through each step together: they stay in the first cache


def quantize_4bit(x: NDArray[Any], dtype: str, *, format: str, block: int, packed: Bytes, absmax: Float32s) -> None:
    """Quantize values in C order.

    Args:
        x: a tensor, or a chunk of one: whole blocks, unless it is the tensor's end.
        dtype: F32, F16 or BF16; 16-bit floats come as uint16.
        format: nf4 or fp4.
        block: values a scale, 32 to 4096.
        packed: [ceil(n / 2)] receives the codes. An odd end is padded with the code of zero.
        absmax: [ceil(n / block)] receives the scales.

    Raises:
        NonFinite: a value is NaN or infinite.
    """
    _quantize(x, dtype, format, block, packed, absmax, given=False)


def quantize_4bit_with(
    x: NDArray[Any], dtype: str, *, format: str, block: int, absmax_given: Float32s, packed: Bytes
) -> None:
    """Quantize values by scales that are there already; what they cannot reach gets the outermost level.

    Arguments as for `quantize_4bit`; a block with scale 0 gets the code of zero.
    """
    _quantize(x, dtype, format, block, packed, absmax_given, given=True)


def dequantize_4bit(
    packed: Bytes, absmax: Float32s, *, format: str, block: int, dtype: str, out: NDArray[Any]
) -> None:
    """out = level of each code times its block's absmax in fp32, rounded once to `dtype` (ties to even).

    Raises:
        NonFinite: a scale is NaN or infinite.
    """
    bits, kind = as_bits(out, dtype)
    book = _checked(bits.size, format, block, packed, absmax)
    if not np.isfinite(absmax).all():
        raise NonFinite("a block scale is NaN or infinite")
    levels = np.empty_like(book.levels)
    levels[book.order] = book.levels

    def work(start: int, stop: int) -> None:
        _decode(packed[start // 2 : (stop + 1) // 2], absmax[start // block :], block, levels, kind, bits[start:stop])

    run_ranges(bits.size, block * GRAIN, work)




def _quantize(
    x: NDArray[Any], dtype: str, format: str, block: int, packed: Bytes, absmax: Float32s, *, given: bool
) -> None:
    bits, kind = as_bits(x, dtype)
    book = _checked(bits.size, format, block, packed, absmax)
    remap = (book.order[:, None] << 4 | book.order).reshape(-1)
    in_order = format == "nf4"
    flaws: list[int] = []

    def work(start: int, stop: int) -> None:
        values, codes = bits[start:stop], packed[start // 2 : (stop + 1) // 2]
        scales = absmax[start // block :]
        if not _encode(values, kind, block, book.bounds, remap, in_order, codes, scales, given):
            flaws.append(start)

    run_ranges(bits.size, block * GRAIN, work)
    if flaws:
        raise NonFinite("a value is NaN or infinite")


def _checked(n: int, format: str, block: int, packed: Bytes, absmax: Float32s) -> Codebook:
    """The codebook, after the arrays were found to fit together. Raises ValueError: the caller is wrong."""
    if block not in BLOCK_SIZES or FORMATS[format].kind != "codebook4":
        raise ValueError(f"no 4-bit format {format} with blocks of {block}")
    if packed.dtype != np.uint8 or packed.shape != (-(-n // 2),) or not packed.flags.c_contiguous:
        raise ValueError(f"{n} codes need {-(-n // 2)} bytes")
    if absmax.dtype != np.float32 or absmax.shape != (-(-n // block),) or not absmax.flags.c_contiguous:
        raise ValueError(f"{n} values need {-(-n // block)} scales")
    return codebook(format)


@kernel
def _encode(
    source: Any, kind: int, block: int, bounds: Any, remap: Any, in_order: bool, packed: Any, absmax: Any, given: bool
) -> bool:
    """All blocks of a chunk. Returns False if a value is not finite."""
    batch = max(block, BATCH)
    bits, ranks = np.empty(batch, np.uint32), np.empty(batch, np.int32)
    values, pairs = bits.view(np.float32), ranks.view(np.uint64)
    fine = True
    for begin in range(0, source.size, batch):
        count = min(batch, source.size - begin)
        widen(source[begin : begin + count], kind, bits)
        for start in range(0, count, block):
            stop = min(start + block, count)
            top = largest(bits[start:stop])
            fine &= top < INFINITY
            index = (begin + start) // block
            if not given:
                absmax[index] = stored_absmax(top, stop - start < block)
            normalize(values[start:stop], absmax[index], stop - start < block)
        if count % 2:
            values[count] = 0
            count += 1
        rank(values[:count], bounds, ranks)
        target = packed[begin // 2 : (begin + count) // 2]
        pack(pairs, target)
        if not in_order:
            for i in range(target.size):
                target[i] = remap[target[i]]
    return bool(fine)


@kernel
def pack(pairs: Any, packed: Any) -> None:
    """packed[i] = first code << 4 | second code, of pairs of 32-bit codes that were read as 64-bit numbers."""
    for i in range(packed.size):
        pair = pairs[i]
        packed[i] = np.uint8(np.uint64(pair << np.uint64(4)) | np.uint64(pair >> np.uint64(32)))


@kernel
def _decode(packed: Any, absmax: Any, block: int, levels: Any, kind: int, out: Any) -> None:
    """All blocks of a chunk: sixteen products and roundings a block, then a table look-up a value."""
    wide = np.empty(levels.size, np.uint32)
    table = np.empty(levels.size, out.dtype)
    for start in range(0, out.size, block):
        stop = min(start + block, out.size)
        scaled_levels(levels, absmax[start // block], wide)
        narrow(wide, kind, table)
        codes = packed[start // 2 : (stop + 1) // 2]
        target = out[start:stop]
        for i in range(target.size // 2):
            target[2 * i] = table[codes[i] >> np.uint8(4)]
            target[2 * i + 1] = table[codes[i] & np.uint8(15)]
        if target.size % 2:
            target[target.size - 1] = table[codes[codes.size - 1] >> np.uint8(4)]
