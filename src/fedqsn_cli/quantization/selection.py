"""Packed 4-bit codes with other codes where a unit is hidden.

Codes are those of elements start .. start + count of a matrix in C order, two a byte; `start` is even. With an odd
number of columns a byte holds the end of one row and the beginning of the next.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.kernels.floats import writable
from fedqsn_cli.kernels.jit import kernel
from fedqsn_cli.kernels.threads import run_ranges

Bytes = NDArray[np.uint8]
Bools = NDArray[np.bool_]

GRAIN = 1 << 17


def select_codes_rows(
    packed: Bytes, *, start: int, count: int, cols: int, hidden: Bools, zero_code: int, fill: Bytes | None = None
) -> None:
    """Replace the codes of hidden rows, in place.

    Args:
        packed: [ceil(count / 2)] codes.
        start, count: which elements of the matrix they are; count is odd at the end of the matrix only.
        cols: columns of the matrix.
        hidden: [rows] flags of all rows of the matrix.
        zero_code: what replaces a code.
        fill: packed codes of the same elements that replace them instead.
    """
    source, filled = _source(packed, start, count, zero_code, fill)
    flags = writable(np.ascontiguousarray(hidden, dtype=np.bool_))

    def work(first: int, stop: int) -> None:
        part = packed[first // 2 : (stop + 1) // 2]
        _rows(part, start + first, stop - first, cols, flags, source[first // 2 :] if filled else source, filled)

    run_ranges(count, GRAIN, work)


def select_codes_cols(
    packed: Bytes, *, start: int, count: int, cols: int, hidden: Bools, zero_code: int, fill: Bytes | None = None
) -> None:
    """Replace the codes of hidden columns, in place; hidden is [cols], the rest as for `select_codes_rows`."""
    source, filled = _source(packed, start, count, zero_code, fill)
    columns = np.flatnonzero(hidden[:cols])

    def work(first: int, stop: int) -> None:
        part = packed[first // 2 : (stop + 1) // 2]
        _columns(part, start + first, stop - first, cols, columns, source[first // 2 :] if filled else source, filled)

    run_ranges(count, GRAIN, work)


def select_codes_elements(
    packed: Bytes, *, count: int, hidden: Bools, zero_code: int, fill: Bytes | None = None
) -> None:
    """Replace the codes of hidden elements, in place; hidden is [count], the rest as for `select_codes_rows`."""
    source, filled = _source(packed, 0, count, zero_code, fill)
    flags = writable(np.ascontiguousarray(hidden, dtype=np.bool_).reshape(-1))
    if flags.size != count:
        raise ValueError(f"{count} codes need as many flags")

    def work(first: int, stop: int) -> None:
        part = packed[first // 2 : (stop + 1) // 2]
        _elements(part, flags[first:stop], source[first // 2 :] if filled else source, filled)

    run_ranges(count, GRAIN, work)


def _source(packed: Bytes, start: int, count: int, zero_code: int, fill: Bytes | None) -> tuple[Bytes, bool]:
    """What replaces codes, and does it have a byte for every byte? Raises ValueError: the caller is wrong."""
    if packed.dtype != np.uint8 or packed.shape != (-(-count // 2),) or start % 2:
        raise ValueError(f"{count} codes from element {start} do not fit {packed.shape} bytes")
    if fill is None:
        return np.full(1, zero_code << 4 | zero_code, np.uint8), False
    if fill.dtype != np.uint8 or fill.shape != packed.shape:
        raise ValueError("the codes to fill with have another shape")
    return writable(fill), True


@kernel
def _put(packed: Any, index: int, source: Any, filled: bool) -> None:
    """Replace one code."""
    byte = index // 2
    mask = np.uint8(0x0F if index % 2 else 0xF0)
    packed[byte] = (packed[byte] & ~mask) | (source[byte if filled else 0] & mask)


@kernel
def _rows(packed: Any, start: int, count: int, cols: int, hidden: Any, source: Any, filled: bool) -> None:
    for row in range(start // max(cols, 1), (start + count - 1) // max(cols, 1) + 1):
        if not hidden[row]:
            continue
        first, stop = max(row * cols - start, 0), min((row + 1) * cols - start, count)
        if first % 2 and first < stop:
            _put(packed, first, source, filled)
            first += 1
        for byte in range(first // 2, stop // 2):
            packed[byte] = source[byte if filled else 0]
        if stop % 2 and first < stop:
            _put(packed, stop - 1, source, filled)


@kernel
def _columns(packed: Any, start: int, count: int, cols: int, columns: Any, source: Any, filled: bool) -> None:
    for row in range(start // max(cols, 1), (start + count - 1) // max(cols, 1) + 1):
        for column in columns:
            index = row * cols + column - start
            if 0 <= index < count:
                _put(packed, index, source, filled)


@kernel
def _elements(packed: Any, hidden: Any, source: Any, filled: bool) -> None:
    for byte in range(hidden.size // 2):
        high = np.uint8(0xF0) if hidden[2 * byte] else np.uint8(0)
        low = np.uint8(0x0F) if hidden[2 * byte + 1] else np.uint8(0)
        mask = np.uint8(high | low)
        packed[byte] = (packed[byte] & ~mask) | (source[byte if filled else 0] & mask)
    if hidden.size % 2 and hidden[hidden.size - 1]:
        _put(packed, hidden.size - 1, source, filled)
