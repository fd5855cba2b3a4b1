"""nf4 and fp4 codes, two a byte, bit for bit as bitsandbytes quantizes on a CPU.

packed[i] = code(x[2 i]) << 4 | code(x[2 i + 1])        absmax[b] = max |x| of block b
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.kernels.floats import PIECE, Floats, writable
from fedqsn_cli.kernels.jit import BF16, NonFinite, kernel, widen
from fedqsn_cli.kernels.threads import run_ranges
from fedqsn_cli.quantization.blocks import BATCH, SMALLEST, largest, normalize, pack_pairs, rank
from fedqsn_cli.quantization.codebooks import BLOCK_SIZES, FORMATS, Codebook, codebook
from fedqsn_cli.quantization.codes4_bf16 import encode_bf16

Bytes = NDArray[np.uint8]
Float32s = NDArray[np.float32]

GRAIN = 1 << 15  # values that are worth a thread


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
    _quantize(x, dtype, format, block, packed, writable(absmax_given), given=True)


def dequantize_4bit(packed: Bytes, absmax: Float32s, *, format: str, block: int, dtype: str, out: NDArray[Any]) -> None:
    """out = level of each code times its block's absmax in fp32, rounded once to `dtype` (ties to even).

    Raises:
        NonFinite: a scale is NaN or infinite.
    """
    target = Floats(out, dtype)
    book = _checked(target.size, format, block, packed, absmax)
    if not np.isfinite(absmax).all():
        raise NonFinite("a block scale is NaN or infinite")
    levels = np.empty_like(book.levels)
    levels[book.order] = book.levels
    pairs = pairs_of(levels)
    packed, absmax = writable(packed), writable(absmax)

    def work(start: int, stop: int) -> None:
        scratch = target.scratch(PIECE)
        for first in range(start, stop, PIECE):
            last = min(first + PIECE, stop)
            values = target.room(first, last, scratch)
            decode(packed[first // 2 : (last + 1) // 2], absmax[first // block :], block, pairs, values)
            target.write(first, last, values)

    run_ranges(target.size, max(block, GRAIN), work)


def pairs_of(levels: Float32s) -> NDArray[np.uint64]:
    """The two levels of each byte of codes, fp32, as 64 bits: [256], from the levels by code, [16]."""
    byte = np.arange(256)
    return np.stack([levels[byte >> 4], levels[byte & 15]], axis=1).view(np.uint64).reshape(-1)


def _quantize(
    x: NDArray[Any], dtype: str, format: str, block: int, packed: Bytes, absmax: Float32s, *, given: bool
) -> None:
    source = Floats(x, dtype)
    book = _checked(source.size, format, block, packed, absmax)
    remap = (book.order[:, None] << 4 | book.order).reshape(-1)
    in_order = format == "nf4"
    by_bits = in_order and source.kind == BF16 and not given
    flaws: list[int] = []

    def work(start: int, stop: int) -> None:
        whole = start + (stop - start) // block * block if by_bits else start
        if whole > start:
            codes, bits = packed[start // 2 : whole // 2], writable(source.bits[start:whole])
            if not encode_bf16(bits, block, book.bounds, codes, absmax[start // block :]):
                flaws.append(start)
        if stop > whole:
            codes, bits = packed[whole // 2 : (stop + 1) // 2], writable(source.bits[whole:stop])
            scales = absmax[whole // block :]
            if not _encode(bits, source.kind, block, book.bounds, remap, in_order, codes, scales, given):
                flaws.append(whole)

    run_ranges(source.size, max(block, GRAIN), work)
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
    bits: Any, kind: int, block: int, bounds: Any, remap: Any, in_order: bool, packed: Any, absmax: Any, given: bool
) -> bool:
    """All blocks of a range of stored floats. Returns False if a value is not finite."""
    batch = max(block, BATCH)
    wide, ratios, ranks = np.empty(batch, np.uint32), np.empty(batch, np.float32), np.empty(batch, np.int32)
    values, pairs = wide.view(np.float32), ranks.view(np.uint64)
    fine = True
    for begin in range(0, bits.size, batch):
        count = min(batch, bits.size - begin)
        widen(bits[begin : begin + count], kind, wide)
        for start in range(0, count, block):
            part = values[start : min(start + block, count)]
            short = part.size < block
            most, index = largest(part), (begin + start) // block
            fine &= most < np.float32(np.inf)
            if not given:
                absmax[index] = max(most, SMALLEST) if short else most
            normalize(part, absmax[index], short, ratios[start:count])
        if count % 2:
            ratios[count] = 0
            count += 1
        rank(ratios[:count], bounds, ranks)
        target = packed[begin // 2 : (begin + count) // 2]
        pack_pairs(pairs, target)
        if not in_order:
            for i in range(target.size):
                target[i] = remap[target[i]]
    return bool(fine)


@kernel
def decode(packed: Any, absmax: Any, block: int, pairs: Any, out: Any) -> None:
    """out = level of each code times the absmax of its block, fp32; see `pairs_of`. Codes begin with a block."""
    batch = max(block, BATCH)
    words = np.empty(batch // 2, np.uint64)
    levels = words.view(np.float32)
    for begin in range(0, out.size, batch):
        target = out[begin : min(begin + batch, out.size)]
        codes = packed[begin // 2 : (begin + target.size + 1) // 2]
        for i in range(codes.size):
            words[i] = pairs[codes[i]]
        for start in range(0, target.size, block):
            stop, scale = min(start + block, target.size), absmax[(begin + start) // block]
            source, part = levels[start:stop], target[start:stop]
            for i in range(part.size):
                part[i] = source[i] * scale
