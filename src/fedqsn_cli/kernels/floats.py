"""Stored floats of any dtype, read and written as fp32, piece by piece: kernels that compute see fp32 only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.kernels.jit import F32, as_bits, narrow, plain_zeros, widen

Array = NDArray[Any]
Float32s = NDArray[np.float32]

PIECE = 1 << 16  # values at a time: their fp32 copy stays in the second cache, and a call costs little beside them


class Floats:
    """An array of stored floats, flat.

    Args:
        x: any shape in C order; F32, F16 or BF16 (16-bit floats as uint16).
        dtype: what it holds.
    """

    def __init__(self, x: Array, dtype: str) -> None:
        self.bits, self.kind = as_bits(x, dtype)
        self.size = self.bits.size

    def scratch(self, size: int) -> Float32s:
        """Room for `size` values, to be handed to `read` or `room` again and again."""
        return np.empty(min(size, self.size), np.float32)

    def read(self, start: int, stop: int, scratch: Float32s) -> Float32s:
        """Values start .. stop as fp32; of F32 the stored ones themselves."""
        if self.kind == F32:
            return writable(self.bits[start:stop].view(np.float32))
        values = scratch[: stop - start]
        widen(writable(self.bits[start:stop]), self.kind, values.view(np.uint32))
        return values

    def room(self, start: int, stop: int, scratch: Float32s) -> Float32s:
        """Where to compute what becomes values start .. stop: in their own place, if they are F32."""
        return self.bits[start:stop].view(np.float32) if self.kind == F32 else scratch[: stop - start]

    def write(self, start: int, stop: int, room: Float32s) -> None:
        """Round what was computed in `room` to the dtype, ties to even."""
        if self.kind != F32:
            narrow(room.view(np.uint32), self.kind, self.bits[start:stop])

    def write_plain(self, start: int, stop: int, room: Float32s) -> None:
        """As `write`, and make every zero 0.0: the sign of a zero would tell what was rounded to it."""
        self.write(start, stop, room)
        plain_zeros(self.bits[start:stop])


def writable(x: Array) -> Array:
    """The same array, or a copy of one that cannot be written: numba would compile another kernel for it."""
    return x if x.flags.writeable else x.copy()
