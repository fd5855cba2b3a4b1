"""Arithmetic on stored values: are they finite, and the same values times a factor."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.quantization.jit import KIND, as_bits, kernel, narrow, to_bits, to_float, widen
from fedqsn_cli.quantization.threads import run_ranges

GRAIN = 1 << 16
PIECE = 1024  # values widened at once: they stay in the first cache

_EXPONENT = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}


def all_finite(x: NDArray[Any], dtype: str) -> bool:
    """Is no value NaN or infinite? Any shape, C order; F32, F16 or BF16 (16-bit floats as uint16)."""
    bits, _ = as_bits(x, dtype)
    exponent = bits.dtype.type(_EXPONENT[dtype])
    flaws: list[int] = []

    def work(start: int, stop: int) -> None:
        if _has_exponent(bits[start:stop], exponent):
            flaws.append(start)

    run_ranges(bits.size, GRAIN, work)
    return not flaws


def scale_values(x: NDArray[Any], dtype: str, factor: np.float32, out: NDArray[Any]) -> None:
    """out = x * factor in fp32, rounded once to `dtype` (ties to even). Any shape, C order; out may be x."""
    bits, kind = as_bits(x, dtype)
    target, _ = as_bits(out, dtype)
    if target.size != bits.size:
        raise ValueError(f"{bits.size} values do not fit into {target.size}")

    def work(start: int, stop: int) -> None:
        _scale(bits[start:stop], kind, np.float32(factor), target[start:stop])

    run_ranges(bits.size, GRAIN, work)


@kernel
def _has_exponent(bits: Any, exponent: Any) -> bool:
    """Has a number all bits of the exponent set?"""
    hits = np.uint32(0)
    for i in range(bits.size):
        hits |= np.uint32((bits[i] & exponent) == exponent)
    return bool(hits != 0)


@kernel
def _scale(source: Any, kind: int, factor: Any, out: Any) -> None:
    bits = np.empty(PIECE, np.uint32)
    for start in range(0, source.size, PIECE):
        part = slice(start, min(start + PIECE, source.size))
        widen(source[part], kind, bits)
        for i in range(PIECE):
            bits[i] = to_bits(to_float(bits[i]) * factor)
        narrow(bits, kind, out[part])


def widened(x: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Stored floats as a fresh flat fp32 array."""
    bits, kind = as_bits(x, dtype)
    wide = np.empty(bits.size, np.uint32)
    widen(bits, kind, wide)
    return wide.view(np.float32)


def narrowed(x: NDArray[Any], dtype: str) -> NDArray[Any]:
    """fp32 values [n] rounded to the dtype, as stored bits (fp32 itself for F32)."""
    out = np.empty(x.size, np.uint32 if dtype == "F32" else np.uint16)
    narrow(x.reshape(-1).view(np.uint32), KIND[dtype], out)
    return out.view(np.float32) if dtype == "F32" else out
