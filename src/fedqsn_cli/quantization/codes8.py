"""int8 codes, one scale a row, bit for bit as bitsandbytes' LLM.int8() quantizes weights on a CPU.

    scb[r] = max |fp16(w[r])|    codes[r] = round(fp16(w[r]) * (127 * (1 / scb[r])))    w' = codes * scb * fp32(1 / 127)

bitsandbytes casts to fp16 first. A row of zeros divides 0 by 0 there; here it gets codes 0 and scale 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.kernels.floats import PIECE, Floats, writable
from fedqsn_cli.kernels.jit import NonFinite, kernel, narrow_half, to_bits, to_float, widen_half
from fedqsn_cli.kernels.threads import run_ranges
from fedqsn_cli.quantization.blocks import largest

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
    source = Floats(x, dtype)
    rows, cols = _checked(x, codes, scb)
    step, flat = max(1, PIECE // max(cols, 1)), codes.reshape(-1)
    flaws: list[int] = []

    def work(start: int, stop: int) -> None:
        scratch = source.scratch(step * cols)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            values = source.read(first * cols, last * cols, scratch)
            if not _encode(values, cols, flat[first * cols : last * cols], scb[first:last]):
                flaws.append(first)

    run_ranges(rows, step, work)
    if flaws:
        raise NonFinite("a value is NaN, infinite, or too large for int8 (beyond fp16)")


def dequantize_int8(codes: NDArray[np.int8], scb: NDArray[np.float32], dtype: str, out: NDArray[Any]) -> None:
    """out[r] = codes[r] * scb[r] * (1 / 127) in fp32, rounded once to `dtype`. Shapes as for `quantize_int8`.

    Raises:
        NonFinite: a scale is NaN or infinite.
    """
    target = Floats(out, dtype)
    rows, cols = _checked(out, codes, scb)
    if not np.isfinite(scb).all():
        raise NonFinite("a row scale is NaN or infinite")
    step, flat, scales = max(1, PIECE // max(cols, 1)), writable(codes.reshape(-1)), writable(scb)

    def work(start: int, stop: int) -> None:
        scratch = target.scratch(step * cols)
        for first in range(start, stop, step):
            begin, end = first * cols, min(first + step, stop) * cols
            values = target.room(begin, end, scratch)
            _decode(flat[begin:end], scales[first : min(first + step, stop)], cols, values)
            target.write(begin, end, values)

    run_ranges(rows, step, work)


def _checked(x: NDArray[Any], codes: NDArray[np.int8], scb: NDArray[np.float32]) -> tuple[int, int]:
    """Rows and columns, after the arrays were found to fit together. Raises ValueError: the caller is wrong."""
    if x.ndim != 2 or codes.dtype != np.int8 or codes.shape != x.shape or not codes.flags.c_contiguous:
        raise ValueError(f"int8 codes of shape {codes.shape} do not fit a matrix of shape {x.shape}")
    if scb.dtype != np.float32 or scb.shape != x.shape[:1] or not scb.flags.c_contiguous:
        raise ValueError(f"{x.shape[0]} rows need as many scales")
    return x.shape[0], x.shape[1]


@kernel
def _encode(values: Any, cols: int, codes: Any, scb: Any) -> bool:
    """All rows of a piece. Returns False if a value is not finite in fp16."""
    halves = np.empty(cols, np.float32)
    fine = True
    for row in range(scb.size):
        source, target = values[row * cols : (row + 1) * cols], codes[row * cols : (row + 1) * cols]
        for i in range(cols):
            halves[i] = to_float(widen_half(narrow_half(to_bits(source[i]))))
        scale = largest(halves)
        finite = scale < np.float32(np.inf)
        fine &= finite
        factor = (np.float32(1) / scale) * np.float32(127) if finite and scale > 0 else np.float32(0)
        scb[row] = scale
        for i in range(cols):
            target[i] = np.int8((halves[i] * factor + ROUNDER) - ROUNDER)
    return bool(fine)


@kernel
def _decode(codes: Any, scb: Any, cols: int, out: Any) -> None:
    for row in range(scb.size):
        source, target = codes[row * cols : (row + 1) * cols], out[row * cols : (row + 1) * cols]
        scale = scb[row]
        for i in range(cols):
            target[i] = (np.float32(source[i]) * scale) * INVERSE
