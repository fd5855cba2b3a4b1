"""int8 codes, one scale a row, bit for bit as bitsandbytes' LLM.int8() quantizes weights on a CPU.

    scb[r] = max |fp16(w[r])|    codes[r] = round(fp16(w[r]) * (127 * (1 / scb[r])))    w' = codes * scb * fp32(1 / 127)

bitsandbytes casts to fp16 first. A row of zeros divides 0 by 0 there; here it gets codes 0 and scale 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.quantization.jit import (
    F16,
    INFINITY,
    NonFinite,
    as_bits,
    kernel,
    largest,
    narrow,
    narrow_half,
    to_bits,
    to_float,
    widen,
    widen_half,
)
from fedqsn_cli.quantization.threads import run_ranges

INVERSE = np.float32(7.874015718698502e-3)  # bitsandbytes' own constant for 1 / 127
ROUNDER = np.float32(3 << 22)  # adding and subtracting it rounds to an integer, ties to even


def quantize_int8(x: NDArray[Any], dtype: str, codes: NDArray[np.int8], scb: NDArray[np.float32]) -> None:
    """Quantize rows.

    Args:
        x: [rows, cols] in F32, F16 or BF16 (16-bit floats as uint16); any number of whole rows of a matrix.
        codes: [rows, cols] receives the codes, -127 .. 127.
        scb: [rows] receives the scales.

    Raises:
        NonFinite: a value is NaN, infinite, or beyond the range of fp16.
    """
    bits, kind = as_bits(x, dtype)
    rows, cols = _checked(x, codes, scb)
    flaws: list[int] = []

    def work(first: int, stop: int) -> None:
        part = slice(first * cols, stop * cols)
        if not _encode(bits[part], kind, cols, codes.reshape(-1)[part], scb[first:stop]):
            flaws.append(first)

    run_ranges(rows, 16, work)
    if flaws:
        raise NonFinite("a value is NaN, infinite, or too large for int8 (beyond fp16)")


def dequantize_int8(codes: NDArray[np.int8], scb: NDArray[np.float32], dtype: str, out: NDArray[Any]) -> None:
    """out[r] = codes[r] * scb[r] * (1 / 127) in fp32, rounded once to `dtype`. Shapes as for `quantize_int8`.

    Raises:
        NonFinite: a scale is NaN or infinite.
    """
    bits, kind = as_bits(out, dtype)
    rows, cols = _checked(out, codes, scb)
    if not np.isfinite(scb).all():
        raise NonFinite("a row scale is NaN or infinite")

    def work(first: int, stop: int) -> None:
        part = slice(first * cols, stop * cols)
        _decode(codes.reshape(-1)[part], scb[first:stop], cols, kind, bits[part])

    run_ranges(rows, 16, work)


def _checked(x: NDArray[Any], codes: NDArray[np.int8], scb: NDArray[np.float32]) -> tuple[int, int]:
    """Rows and columns, after the arrays were found to fit together. Raises ValueError: the caller is wrong."""
    if x.ndim != 2 or codes.dtype != np.int8 or codes.shape != x.shape or not codes.flags.c_contiguous:
        raise ValueError(f"int8 codes of shape {codes.shape} do not fit a matrix of shape {x.shape}")
    if scb.dtype != np.float32 or scb.shape != x.shape[:1]:
        raise ValueError(f"{x.shape[0]} rows need as many scales")
    return x.shape[0], x.shape[1]


@kernel
def _encode(source: Any, kind: int, cols: int, codes: Any, scb: Any) -> bool:
    """All rows of a chunk. Returns False if a value is not finite in fp16."""
    bits = np.empty(cols, np.uint32)
    values = bits.view(np.float32)
    fine = True
    for row in range(scb.size):
        start = row * cols
        widen(source[start : start + cols], kind, bits)
        if kind != F16:
            for i in range(cols):
                bits[i] = widen_half(narrow_half(bits[i]))
        top = largest(bits)
        fine &= top < INFINITY
        scb[row] = to_float(top)
        factor = np.float32(0)
        if np.uint32(0) < top < INFINITY:
            factor = (np.float32(1) / scb[row]) * np.float32(127)
        target = codes[start : start + cols]
        for i in range(cols):
            target[i] = np.int8((values[i] * factor + ROUNDER) - ROUNDER)
    return fine


@kernel
def _decode(codes: Any, scb: Any, cols: int, kind: int, out: Any) -> None:
    bits = np.empty(cols, np.uint32)
    for row in range(scb.size):
        start = row * cols
        source = codes[start : start + cols]
        for i in range(cols):
            bits[i] = to_bits((np.float32(source[i]) * scb[row]) * INVERSE)
        narrow(bits, kind, out[start : start + cols])
