"""Slow and short versions of the kernels, and the two ways between torch tensors and stored bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedqsn_cli.quantization.codebooks import FORMATS

Array = NDArray[Any]
Float32s = NDArray[np.float32]

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = list(TORCH)
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def stored(x: torch.Tensor) -> Array:
    """A tensor as the kernels see it: fp32, or 16-bit floats as uint16."""
    return x.numpy() if x.dtype == torch.float32 else x.view(torch.int16).numpy().view(np.uint16)


def tensor(x: Array, dtype: str) -> torch.Tensor:
    """Stored bits as a tensor."""
    x = x if x.flags.writeable else x.copy()
    return torch.from_numpy(x if dtype == "F32" else x.view(np.int16)).view(TORCH[dtype])


def wide(x: Array, dtype: str) -> Float32s:
    """Stored bits as fp32 values."""
    return tensor(x, dtype).float().numpy()


def narrow(x: Float32s, dtype: str) -> Array:
    """fp32 values as stored bits of a dtype, rounded to nearest, ties to even."""
    return stored(torch.from_numpy(np.ascontiguousarray(x)).to(TORCH[dtype]))


def bits(x: Array) -> bytes:
    return np.ascontiguousarray(x).tobytes()


def numbers(x: Array, dtype: str) -> Array:
    """Stored bits, with those of 0.0 for -0.0."""
    raw = x.view(np.uint32) if dtype == "F32" else x
    return np.where(raw == (1 << 8 * raw.itemsize - 1), raw.dtype.type(0), raw)


def normals(n: int, dtype: str, *, scale: float = 1.0, seed: int = 0) -> Array:
    """n normal numbers in a dtype; what it cannot hold becomes its largest number."""
    values = np.random.default_rng(seed).standard_normal(n) * scale
    limit = float(torch.finfo(TORCH[dtype]).max)
    return stored(torch.from_numpy(np.clip(values, -limit, limit)).to(TORCH[dtype]))


def quantize_run(x: Float32s, format: str, block: int, absmax: Float32s | None = None) -> tuple[Array, Float32s]:
    """Codes and scales of one run of values, or codes by given scales."""
    values = np.array(FORMATS[format].values, np.float32)
    order = np.argsort(values, kind="stable")
    bounds = (values[order][:-1] + values[order][1:]) / np.float32(2)
    codes, scales = np.empty(x.size, np.uint8), np.empty(-(-x.size // block), np.float32)
    for b, start in enumerate(range(0, x.size, block)):
        part = x[start : start + block]
        short = part.size < block
        least = np.float32(1e-38) if short else np.float32(0)
        scales[b] = max(np.abs(part).max(), least) if absmax is None else absmax[b]
        divisor = max(scales[b], np.float32(1e-38))
        with np.errstate(over="ignore"):
            y = part / divisor if short else part * (np.float32(1) / divisor)
        codes[start : start + block] = order[np.searchsorted(bounds, y if scales[b] else part * 0, side="left")]
    return codes, scales


def snap_run(x: Float32s, format: str, block: int) -> Float32s:
    """One run of values on the grid, in fp32."""
    codes, scales = quantize_run(x, format, block)
    blank = np.array([not x[start : start + block].any() for start in range(0, x.size, block)])
    scales = np.where(blank, np.float32(0), scales)
    return np.array(FORMATS[format].values, np.float32)[codes] * np.repeat(scales, block)[: x.size] + np.float32(0)


def snap_int8_run(x: Float32s) -> Float32s:
    """One run of values on int8's grid, in fp32, for scales that need no shift."""
    absmax = np.abs(x).max(initial=np.float32(0))
    factor = np.float32(1) / absmax * np.float32(127) if absmax else np.float32(0)
    codes = np.clip(np.rint(x * factor), -127, 127).astype(np.float32)
    return codes * absmax * np.float32(7.874015718698502e-3) + np.float32(0)


def pack(codes: Array, zero: int) -> Array:
    """Two codes a byte, the first one high; an odd end is padded with the code of zero."""
    even = np.append(codes, np.uint8(zero)) if codes.size % 2 else codes
    return (even[::2] << 4 | even[1::2]).astype(np.uint8)


def unpack(packed: Array, n: int) -> Array:
    return np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:n]


@st.composite
def weights(draw: st.DrawFn, max_size: int = 300) -> tuple[Array, str]:
    """A few finite numbers of any size (subnormal and huge ones, too) in some dtype."""
    dtype = draw(st.sampled_from(DTYPES))
    infinite = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}[dtype]
    sign = 1 << (31 if dtype == "F32" else 15)
    ends = st.integers(0, 8) | st.integers(infinite - 9, infinite - 1)
    magnitude = st.integers(0, infinite - 1) | ends | st.just(0)
    number = st.builds(lambda size, negative: size | (sign if negative else 0), magnitude, st.booleans())
    raw = draw(st.lists(number, min_size=1, max_size=max_size))
    x = np.array(raw, np.uint32 if dtype == "F32" else np.uint16)
    return (x.view(np.float32) if dtype == "F32" else x), dtype
