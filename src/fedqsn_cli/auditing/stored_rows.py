"""Rows of weights as they are stored: floats of any width, or codes with their scales. Read-only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.auditing.kernels import PACKED
from fedqsn_cli.kernels.floats import writable
from fedqsn_cli.kernels.jit import as_bits
from fedqsn_cli.quantization import kernels
from fedqsn_cli.quantization.bnb_format import Packing
from fedqsn_cli.quantization.codebooks import FORMATS
from fedqsn_cli.quantization.codes4 import pairs_of

Array = NDArray[Any]
Floats = NDArray[np.float32]

_NO_SCALES, _NO_PAIRS = np.empty(0, np.float32), np.empty(0, np.uint64)


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Rows of a matrix.

    Args:
        data: packed 4-bit codes from the beginning of a block on, flat; int8 codes or floats as stored, [rows, cols].
        dtype: of the data. packing, scales: None where they are floats.
        skipped: elements before the rows in the block that they begin in.
    """

    rows: int
    cols: int
    data: Array
    dtype: str
    packing: Packing | None = None
    scales: Floats | None = None
    skipped: int = 0

    @classmethod
    def of(cls, x: Array, dtype: str = "F32") -> StoredRows:
        """Floats, [rows, cols]."""
        rows, cols = x.shape
        return cls(rows, cols, np.ascontiguousarray(x), dtype)

    def values(self) -> Floats:
        """What a client computes with, in fp32: [rows, cols]."""
        packing = self.packing
        if packing is None or self.scales is None:
            wide: Floats = kernels.widened(self.data, self.dtype).reshape(self.rows, self.cols)
            return wide
        if packing.kind == "pack4":
            decode = partial(kernels.dequantize_4bit, format=packing.format, block=packing.block, dtype="F32")
            return self.decoded(decode)
        out = np.empty((self.rows, self.cols), np.float32)
        kernels.dequantize_int8(self.data, self.scales, "F32", out)
        return out

    def decoded(self, decode: Callable[..., None]) -> Floats:
        """4-bit codes: [rows, cols].

        Args:
            decode: takes the codes and scales of whole blocks, and writes their values into `out`.
        """
        flat = np.empty(self.skipped + self.rows * self.cols, np.float32)
        decode(self.data, self.scales, out=flat)
        return flat[self.skipped :].reshape(self.rows, self.cols)

    @property
    def numbers(self) -> tuple[Array, int, int, Floats, int, NDArray[np.uint64]]:
        """As `kernels.compare` takes them: data, kind, skipped, scales, block, pairs."""
        packing = self.packing
        if packing is not None and packing.kind == "pack4" and self.scales is not None:
            scales = writable(self.scales)
            return writable(self.data), PACKED, self.skipped, scales, packing.block, _pairs(packing.format)
        bits, kind = as_bits(*((self.data, self.dtype) if packing is None else (self.values(), "F32")))
        return writable(bits), kind, 0, _NO_SCALES, 1, _NO_PAIRS


@cache
def _pairs(format: str) -> NDArray[np.uint64]:
    return pairs_of(np.array(FORMATS[format].values, np.float32))
