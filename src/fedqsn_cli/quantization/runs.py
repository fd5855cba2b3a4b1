"""A run of fp32 values as block-wise codes: encoded as a whole, decoded slice by slice.

Values first .. first + count are in blocks first // block .. (first + count - 1) // block, so a slice of them needs the
codes and the scales of these blocks only, and gives the same bits as the whole.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.quantization.blocks8 import LARGEST, dequantize_blocks8, quantize_blocks8
from fedqsn_cli.quantization.codebooks import FORMATS
from fedqsn_cli.quantization.codes4 import dequantize_4bit, quantize_4bit

Bytes = NDArray[np.uint8]
Float32s = NDArray[np.float32]
RunFormat = Literal["int8", "nf4"]

_INFINITY = np.uint32(0x7F800000)  # bits of fp32; all above it are infinite, NaN or negative


class MalformedCodes(Exception):
    """Codes or scales that no encoder writes."""


def encode_run(x: Float32s, format: RunFormat, block: int) -> tuple[Bytes, Float32s]:
    """Codes, as bytes, and scales of all values of a run, [n].

    Raises:
        NonFinite: a value is NaN or infinite.
    """
    absmax = np.empty(-(-x.size // block), np.float32)
    if format == "int8":
        codes = np.empty(x.size, np.int8)
        quantize_blocks8(x, block=block, codes=codes, absmax=absmax)
        return codes.view(np.uint8), absmax
    packed = np.empty(-(-x.size // 2), np.uint8)
    quantize_4bit(x, "F32", format=format, block=block, packed=packed, absmax=absmax)
    return packed, absmax


def decode_run(codes: Bytes, absmax: Float32s, format: RunFormat, block: int, count: int) -> Float32s:
    """`count` values, from the first of a block on: fresh fp32 [count].

    Args:
        codes: their bytes. absmax: [ceil(count / block)].

    Raises:
        MalformedCodes: a scale is NaN, infinite or negative, or a code is none of the format.
    """
    if absmax.size and int(absmax.view(np.uint32).max()) >= _INFINITY:
        raise MalformedCodes("a block scale is NaN, infinite or negative")
    out = np.empty(count, np.float32)
    if format == "int8":
        signed = codes.view(np.int8)
        if signed.size and int(signed.min()) < -LARGEST:
            raise MalformedCodes("a code is below -127")
        dequantize_blocks8(signed, absmax, block=block, out=out)
        return out
    if count % 2 and codes[-1] & 15 != FORMATS[format].zero_code:
        raise MalformedCodes("there is a code after the last value")
    dequantize_4bit(codes, absmax, format=format, block=block, dtype="F32", out=out)
    return out
