"""The dtypes of safetensors, as data: every other table of dtypes in the package derives from this one.

Rows are in the order in which the safetensors library writes tensors into a file: wide dtypes first.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoredDtype:
    """One dtype of stored tensors.

    Args:
        name: as safetensors spells it.
        nbytes: of one value.
        numpy: numpy's type for stored values, little-endian; the raw bits of floats that numpy does not know.
        torch: torch's name; None for dtypes that fedqsn does not compute with.
        holds_weights: whether fedqsn masks, quantizes and merges tensors of it.
    """

    name: str
    nbytes: int
    numpy: str
    torch: str | None = None
    holds_weights: bool = False

    @property
    def bits(self) -> str:
        """numpy's type for weights that are worked on: F32 as numbers, 16-bit floats as their bits."""
        return "<u2" if self.nbytes == 2 else "<f4"


DTYPES = {
    dtype.name: dtype
    for dtype in (
        StoredDtype("U64", 8, "<u8"),
        StoredDtype("I64", 8, "<i8", "int64"),
        StoredDtype("F64", 8, "<f8", "float64"),
        StoredDtype("C64", 8, "<c8"),
        StoredDtype("F32", 4, "<f4", "float32", holds_weights=True),
        StoredDtype("U32", 4, "<u4"),
        StoredDtype("I32", 4, "<i4", "int32"),
        StoredDtype("BF16", 2, "<u2", "bfloat16", holds_weights=True),
        StoredDtype("F16", 2, "<f2", "float16", holds_weights=True),
        StoredDtype("U16", 2, "<u2"),
        StoredDtype("I16", 2, "<i2", "int16"),
        StoredDtype("F8_E5M2FNUZ", 1, "u1"),
        StoredDtype("F8_E4M3FNUZ", 1, "u1"),
        StoredDtype("F8_E8M0", 1, "u1"),
        StoredDtype("F8_E4M3", 1, "u1"),
        StoredDtype("F8_E5M2", 1, "u1"),
        StoredDtype("I8", 1, "i1", "int8"),
        StoredDtype("U8", 1, "u1", "uint8"),
        StoredDtype("BOOL", 1, "?", "bool"),
    )
}

WEIGHT_DTYPES = frozenset(name for name, dtype in DTYPES.items() if dtype.holds_weights)
"""F32, F16 and BF16."""

SHORT_DTYPES = frozenset(name for name in WEIGHT_DTYPES if DTYPES[name].nbytes == 2)
"""F16 and BF16: weights that merging rounds, and that keep a residual."""

FROM_TORCH = {DTYPES[name].torch: name for name in WEIGHT_DTYPES}
"""F32, F16 and BF16 by torch's names, which config.json uses."""
