"""int8 codes of a run of fp32 values, one scale a block.

    absmax[b] = max |x| of block b        code = round(x / (absmax / 127))        x' = code * (absmax / 127)

Unlike codes8.py, it neither casts to fp16 first, in which small updates vanish, nor knows rows. It computes in double
precision and rounds x' to fp32 once, so that scales of any size are as exact as others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.kernels.floats import writable
from fedqsn_cli.kernels.jit import NonFinite, kernel
from fedqsn_cli.kernels.threads import run_ranges
from fedqsn_cli.quantization.blocks import largest

Float32s = NDArray[np.float32]
Codes = NDArray[np.int8]

GRAIN = 1 << 15  # values that are worth a thread
LARGEST = 127


def quantize_blocks8(x: Float32s, *, block: int, codes: Codes, absmax: Float32s) -> None:
    """Quantize a run of values.

    Args:
        x: [n]. block: values a scale.
        codes: [n] receives the codes, -127 .. 127. absmax: [ceil(n / block)] receives the scales.

    Raises:
        NonFinite: a value is NaN or infinite.
    """
    x = writable(x)
    flaws: list[int] = []

    def work(start: int, stop: int) -> None:
        if not _encode(x[start:stop], block, codes[start:stop], absmax[start // block :]):
            flaws.append(start)

    run_ranges(x.size, max(block, GRAIN), work)
    if flaws:
        raise NonFinite("a value is NaN or infinite")


def dequantize_blocks8(codes: Codes, absmax: Float32s, *, block: int, out: Float32s) -> None:
    """out = the value of each code: [n]. `absmax` is finite; `codes` begins with a block."""
    codes, absmax = writable(codes), writable(absmax)

    def work(start: int, stop: int) -> None:
        _decode(codes[start:stop], absmax[start // block :], block, out[start:stop])

    run_ranges(codes.size, max(block, GRAIN), work)


@kernel
def _encode(x: Any, block: int, codes: Any, absmax: Any) -> bool:
    """All blocks of a range. Returns False if a value is not finite."""
    fine = True
    for start in range(0, x.size, block):
        part, target = x[start : start + block], codes[start : start + block]
        most = largest(part)
        finite = most < np.float32(np.inf)
        fine &= finite
        absmax[start // block] = most
        factor = np.float64(LARGEST) / np.float64(most) if finite and most > 0 else 0.0
        for i in range(part.size):
            target[i] = np.int8(np.rint(np.float64(part[i]) * factor)) if finite else np.int8(0)
    return bool(fine)


@kernel
def _decode(codes: Any, absmax: Any, block: int, out: Any) -> None:
    """All blocks of a range."""
    for start in range(0, codes.size, block):
        part, target = codes[start : start + block], out[start : start + block]
        step = np.float64(absmax[start // block]) / np.float64(LARGEST)
        for i in range(part.size):
            target[i] = np.float32(np.float64(part[i]) * step)
