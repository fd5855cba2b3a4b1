"""Block scales that are quantized themselves, as they are stored, and back; `nested` makes them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Float32s = NDArray[np.float32]

NESTED_BLOCK = 256
"""Scales that share a scale, where they are quantized themselves."""


@dataclass(frozen=True, slots=True)
class DoubleQuantized:
    """Quantized block scales.

    Args:
        codes: uint8 [n], the scales.
        nested_absmax: fp32 [ceil(n / 256)], the scales of the scales.
        nested_map: fp32 [256], the dynamic map.
        offset: the mean of the scales before they were quantized.
    """

    codes: Bytes
    nested_absmax: Float32s
    nested_map: Float32s
    offset: np.float32


def double_dequantize(scales: DoubleQuantized) -> Float32s:
    """The block scales that bitsandbytes computes with: fp32 [n]."""
    each = np.repeat(scales.nested_absmax, NESTED_BLOCK)[: scales.codes.size]
    absmax: Float32s = scales.nested_map[scales.codes] * each + scales.offset
    return absmax
