"""Packed codes of hidden units are replaced, and no other bit is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedqsn_cli.quantization import kernels
from support.passes import threads_of
from support.reference import bits, pack, unpack

Array = NDArray[Any]
ZERO = 7


def chosen(axis: str, hidden: Array, rows: int, cols: int) -> Array:
    """One flag an element, in C order."""
    shape = {"rows": (rows, 1), "cols": (1, cols), "elements": (rows, cols)}[axis]
    return np.broadcast_to(hidden.reshape(shape), (rows, cols)).reshape(-1)


def select(axis: str, packed: Array, start: int, count: int, cols: int, hidden: Array, fill: Array | None) -> None:
    if axis == "elements":
        kernels.select_codes_elements(
            packed, count=count, hidden=hidden[start : start + count], zero_code=ZERO, fill=fill
        )
        return
    function = kernels.select_codes_rows if axis == "rows" else kernels.select_codes_cols
    function(packed, start=start, count=count, cols=cols, hidden=hidden, zero_code=ZERO, fill=fill)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["rows", "cols", "elements"]),
    st.integers(1, 12),
    st.integers(1, 12),
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.integers(0, 30),
)
def test_hidden_codes_are_replaced_in_chunks_of_any_even_start(
    axis: str, rows: int, cols: int, filled: bool, seed: int, step: int
) -> None:
    rng = np.random.default_rng(seed)
    n = rows * cols
    hidden = rng.random({"rows": rows, "cols": cols, "elements": n}[axis]) < 0.4
    codes, others = rng.integers(0, 16, n, np.uint8), rng.integers(0, 16, n, np.uint8)
    flags = chosen(axis, hidden, rows, cols)
    should = np.where(flags, others if filled else ZERO, codes)
    step = 2 * step or n
    result = []
    for start in range(0, n, step):
        count = min(step, n - start)
        packed = pack(codes[start : start + count], ZERO)
        fill = pack(others[start : start + count], ZERO) if filled else None
        select(axis, packed, start, count, cols, hidden, fill)
        result.append(unpack(packed, count))
    assert bits(np.concatenate(result)) == bits(should)


@pytest.mark.parametrize("axis", ["rows", "cols", "elements"])
def test_padding_at_an_odd_end_stays(axis: str) -> None:
    codes = np.zeros(9, np.uint8)
    packed = pack(codes, 3)
    hidden = np.ones(9 if axis == "elements" else 3, bool)
    select(axis, packed, 0, 9, 3, hidden, None)
    assert unpack(packed, 10).tolist() == [ZERO] * 9 + [3]


@pytest.mark.parametrize("axis", ["rows", "cols", "elements"])
def test_threads_do_not_change_a_bit(axis: str) -> None:
    rows, cols = 701, 999
    rng = np.random.default_rng(0)
    hidden = rng.random({"rows": rows, "cols": cols, "elements": rows * cols}[axis]) < 0.4
    codes = rng.integers(0, 16, rows * cols, np.uint8)
    results = []
    for count in (1, 2, 5):
        packed = pack(codes, ZERO)
        with threads_of(count):
            select(axis, packed, 0, rows * cols, cols, hidden, None)
        results.append(bits(packed))
    assert results[0] == results[1] == results[2]
    should = np.where(chosen(axis, hidden, rows, cols), ZERO, codes)
    assert results[0] == bits(pack(should, ZERO))


def test_arrays_that_do_not_fit_are_a_bug_of_the_caller() -> None:
    good: dict[str, Any] = {"start": 0, "count": 8, "cols": 4, "hidden": np.ones(2, bool), "zero_code": 7}
    for wrong in ({"start": 1}, {"count": 9}, {"fill": np.zeros(3, np.uint8)}):
        with pytest.raises(ValueError):
            kernels.select_codes_rows(np.zeros(4, np.uint8), **(good | wrong))
    with pytest.raises(ValueError):
        kernels.select_codes_elements(np.zeros(4, np.uint8), count=8, hidden=np.ones(7, bool), zero_code=7)
