"""Zeros, or other values, where units are hidden: the same as numpy's indexing, whatever the dtype."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedqsn_cli.masks.unit_mask import UnitMask

DTYPES = ("u1", "u2", "i1", "<f4", "V8")


def matrix(random: np.random.Generator, shape: tuple[int, int], dtype: str) -> np.ndarray:
    size = np.dtype(dtype).itemsize
    return random.integers(0, 256, (shape[0], shape[1] * size), np.uint8).view(dtype)


@settings(deadline=None)  # a kernel may compile
@given(
    rows=st.integers(1, 9),
    cols=st.integers(1, 70),
    axis=st.sampled_from(["row", "column", "element"]),
    dtype=st.sampled_from(DTYPES),
    filled=st.booleans(),
    seed=st.integers(0, 99),
)
def test_marked_elements_are_replaced_and_no_others(
    rows: int, cols: int, axis: str, dtype: str, filled: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    x, source = matrix(random, (rows, cols), dtype), matrix(random, (rows, cols), dtype)
    marks = random.random({"row": rows, "column": (1, cols), "element": rows * cols}[axis]) < 0.5
    mask = UnitMask(axis, (1, rows, cols), marks)  # type: ignore[arg-type]
    shape = {"row": (rows, 1), "column": (1, cols), "element": (rows, cols)}[axis]
    flags = np.broadcast_to(marks.reshape(shape), x.shape)

    expected = x.copy()
    expected[flags] = source[flags] if filled else np.zeros(1, dtype)
    mask.overwrite(x, 0, source if filled else None)

    assert x.tobytes() == expected.tobytes()


def test_memory_in_another_order_is_refused() -> None:
    mask = UnitMask("row", (1, 4, 4), np.ones(4, np.bool_))

    with pytest.raises(ValueError, match="C order"):
        mask.overwrite(np.zeros((4, 4)).T, 0, None)


@given(
    lead=st.integers(1, 3),
    rows=st.integers(1, 6),
    cols=st.sampled_from([1, 3, 32, 64, 100, 128]),
    axis=st.sampled_from(["row", "column", "element"]),
    block=st.sampled_from([32, 64]),
    seed=st.integers(0, 99),
)
def test_a_block_is_full_when_all_its_elements_are_marked(
    lead: int, rows: int, cols: int, axis: str, block: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    shape = {"row": lead * rows, "column": (lead, cols), "element": lead * rows * cols}[axis]
    marks = random.random(shape) < random.choice([0.5, 0.97])
    mask = UnitMask(axis, (lead, rows, cols), marks)  # type: ignore[arg-type]
    whole = np.zeros((lead, rows, cols), np.bool_)
    whole |= {
        "row": lambda: marks.reshape(lead, rows, 1),
        "column": lambda: marks.reshape(lead, 1, cols),
        "element": lambda: marks.reshape(lead, rows, cols),
    }[axis]()

    flat = whole.reshape(-1)
    expected = [bool(flat[start : start + block].all()) for start in range(0, flat.size, block)]

    assert mask.full_blocks(block).tolist() == expected
