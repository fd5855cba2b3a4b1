"""The scales of one packed tensor, of its 4-bit blocks or its int8 rows: plain, or quantized themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.quantization.bnb_names import companion_arrays
from fedqsn_cli.quantization.nested import DoubleQuantized, double_dequantize, double_quantize, nearest_codes

Array = NDArray[Any]
Bools = NDArray[np.bool_]
Float32s = NDArray[np.float32]


class How(Protocol):
    """What names a quantization: a format, say nf4."""

    @property
    def format(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Scales:
    """Scales of one packed tensor.

    Args:
        block: elements that share a scale, in C order: a block, or a row of int8 codes.
        plain: fp32 [blocks], what codes are multiplied by; None if `nested` tells it.
        nested: the scales when they are quantized themselves.
    """

    block: int
    plain: Float32s | None
    nested: DoubleQuantized | None = None

    @classmethod
    def of(cls, absmax: Float32s, block: int, double: bool) -> Scales:
        """The scales that quantizing a tensor made, quantized themselves if `double`. Raises NonFinite."""
        return cls(block, None, double_quantize(absmax)) if double else cls(block, absmax)

    def absmax(self) -> Float32s:
        """What codes are multiplied by: fp32 [blocks]."""
        if self.nested is not None:
            return double_dequantize(self.nested)
        assert self.plain is not None
        return self.plain

    def of_rows(self, first: int, rows: int, cols: int) -> Float32s:
        """The scales of rows first .. first + rows of a matrix; they start with a block."""
        return self.absmax()[first * cols // self.block : -(-(first + rows) * cols // self.block)]

    def times(self, factor: np.float32) -> Scales:
        """Every scale times `factor`, rounded to fp32; the codes of quantized scales stay."""
        factor = np.float32(factor)
        if self.nested is None:
            return replace(self, plain=self.absmax() * factor)
        absmax, offset = self.nested.nested_absmax * factor, np.float32(self.nested.offset * factor)
        return replace(self, nested=replace(self.nested, nested_absmax=absmax, offset=offset))

    def without(self, unseen: Bools, base: Scales | None) -> Scales:
        """The same scales, but those marked `unseen` say nothing about this tensor.

        Args:
            unseen: [blocks]; all codes there are the code of zero, or the base's.
            base: scales to put there. None puts 0, or into quantized scales the code of their offset.
        """
        if self.nested is None:
            absmax = self.absmax().copy()
            absmax[unseen] = 0 if base is None else base.absmax()[unseen]
            return replace(self, plain=absmax)
        wanted = np.full(unseen.size, self.nested.offset, np.float32)
        if base is not None:
            wanted[unseen] = base.absmax()[unseen]
        codes = np.where(unseen, nearest_codes(wanted, self.nested), self.nested.codes)
        return replace(self, nested=replace(self.nested, codes=codes))

    def stored(self, name: str, how: How, dtype: str, shape: Sequence[int]) -> dict[str, Array]:
        """The tensors that hold these scales in a checkpoint; arguments as for `companion_specs`."""
        return companion_arrays(name, shape, dtype, how.format, self.block, absmax=self.plain, nested=self.nested)
