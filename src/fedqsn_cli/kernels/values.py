"""Arithmetic on stored values: are they finite, and the same values times a factor."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.kernels.floats import PIECE, Floats, writable
from fedqsn_cli.kernels.jit import KIND, as_bits, kernel, narrow, widen
from fedqsn_cli.kernels.threads import run_ranges

GRAIN = 1 << 16

_EXPONENT = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}


def all_finite(x: NDArray[Any], dtype: str) -> bool:
    """Is no value NaN or infinite? Any shape, C order; F32, F16 or BF16 (16-bit floats as uint16)."""
    bits, _ = as_bits(x, dtype)
    exponent = bits.dtype.type(_EXPONENT[dtype])
    flaws: list[int] = []

    def work(start: int, stop: int) -> None:
        if _has_exponent(writable(bits[start:stop]), exponent):
            flaws.append(start)

    run_ranges(bits.size, GRAIN, work)
    return not flaws


def scale_values(x: NDArray[Any], dtype: str, factor: np.float32, out: NDArray[Any]) -> None:
    """out = x * factor in fp32, rounded once to `dtype` (ties to even). Any shape, C order; out may be x."""
    source, target = Floats(x, dtype), Floats(out, dtype)
    if target.size != source.size:
        raise ValueError(f"{source.size} values do not fit into {target.size}")
    factor = np.float32(factor)

    def work(start: int, stop: int) -> None:
        scratch = source.scratch(PIECE)
        for first in range(start, stop, PIECE):
            last = min(first + PIECE, stop)
            values = target.room(first, last, scratch)
            with np.errstate(over="ignore"):
                np.multiply(source.read(first, last, scratch), factor, out=values)
            target.write(first, last, values)

    run_ranges(source.size, PIECE, work)


@kernel
def _has_exponent(bits: Any, exponent: Any) -> bool:
    """Has a number all bits of the exponent set?"""
    hits = np.uint32(0)
    for i in range(bits.size):
        hits |= np.uint32((bits[i] & exponent) == exponent)
    return bool(hits != 0)


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
