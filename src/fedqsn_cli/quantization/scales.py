"""The scales of one packed tensor, of its 4-bit blocks or its int8 rows: plain, or quantized themselves.

Compiled kernels are imported where something is quantized: who only reads or trains does without the compiler, which
takes 60 MiB.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.quantization.nested_scales import DoubleQuantized, double_dequantize

Bools = NDArray[np.bool_]
Float32s = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Scales:
    """Scales of one packed tensor.

    Args:
        format: nf4, fp4 or int8.
        block: values a scale; 0 for int8, which has one scale a row.
        absmax: fp32 [blocks or rows], what codes are multiplied by.
        nested: how they are stored when they are quantized themselves; `absmax` is what it dequantizes to.
    """

    format: str
    block: int
    absmax: Float32s
    nested: DoubleQuantized | None = None

    @classmethod
    def of(cls, format: str, block: int, absmax: Float32s, *, double: bool) -> Scales:
        """The scales that quantizing a tensor made, quantized themselves if `double`. Raises NonFinite."""
        plain = cls(format, block, absmax)
        if not double:
            return plain
        from fedqsn_cli.quantization.nested import double_quantize

        return plain._with(double_quantize(absmax))

    def times(self, factor: np.float32) -> Scales:
        """Every scale times `factor`, rounded to fp32; the codes of quantized scales stay."""
        factor = np.float32(factor)
        if self.nested is None:
            return replace(self, absmax=self.absmax * factor)
        absmax, offset = self.nested.nested_absmax * factor, np.float32(self.nested.offset * factor)
        return self._with(replace(self.nested, nested_absmax=absmax, offset=offset))

    def without(self, unseen: Bools, base: Scales | None) -> Scales:
        """The same scales, but those marked `unseen` say nothing about this tensor.

        Args:
            unseen: [blocks or rows]; all codes there are the code of zero, or the base's.
            base: scales to put there. None puts 0, or into quantized scales the code that a block of zeros has: what is
                hidden from a client looks like what the server hides.
        """
        if self.nested is None:
            absmax = self.absmax.copy()
            absmax[unseen] = 0 if base is None else base.absmax[unseen]
            return replace(self, absmax=absmax)
        from fedqsn_cli.quantization.nested import nearest_codes

        wanted = np.zeros(unseen.size, np.float32)
        if base is not None:
            wanted[unseen] = base.absmax[unseen]
        codes = np.where(unseen, nearest_codes(wanted, self.nested), self.nested.codes)
        return self._with(replace(self.nested, codes=codes))

    def _with(self, nested: DoubleQuantized) -> Scales:
        return replace(self, absmax=double_dequantize(nested), nested=nested)
