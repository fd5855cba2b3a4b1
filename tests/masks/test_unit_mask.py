"""UnitMask against plain flags of every element."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedqsn_cli.masks.unit_mask import UnitMask
from support.scenario import few

Bools = NDArray[np.bool_]


@st.composite
def masks(draw: st.DrawFn, largest_lead: int = 3) -> UnitMask:
    """Any mask of a small tensor."""
    view = (draw(st.integers(1, largest_lead)), draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    axis = draw(st.sampled_from(["row", "column", "element"]))
    units = {"row": view[1], "column": view[2], "element": view[1] * view[2]}[axis]
    share = draw(st.sampled_from([0.0, 0.2, 0.8, 1.0]))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    return UnitMask.from_groups(axis, view, [rng.random(units) < share for _ in range(view[0])])


def flags(mask: UnitMask) -> Bools:
    """One flag an element, [lead * rows, cols]."""
    lead, rows, cols = mask.view
    if mask.axis == "row":
        return np.repeat(mask.flags[:, None], cols, axis=1)
    if mask.axis == "column":
        return np.repeat(mask.flags, rows, axis=0)
    return mask.flags.reshape(lead * rows, cols)


@st.composite
def runs(draw: st.DrawFn) -> tuple[UnitMask, int, int]:
    """A mask and a run of rows; in one lead slice where units are columns."""
    mask = draw(masks())
    lead, rows, _ = mask.view
    part = draw(st.integers(0, lead - 1)) if mask.axis == "column" else 0
    height = rows if mask.axis == "column" else lead * rows
    first = draw(st.integers(0, height - 1))
    return mask, part * rows + first, draw(st.integers(1, height - first))


@few(200)
@given(masks())
def test_count_is_the_number_of_marked_elements(mask: UnitMask) -> None:
    assert mask.count == np.count_nonzero(flags(mask))


@few(200)
@given(masks(largest_lead=1))
def test_a_transposed_mask_marks_the_same_elements(mask: UnitMask) -> None:
    np.testing.assert_array_equal(flags(mask.transposed()), flags(mask).T)
    np.testing.assert_array_equal(flags(mask.transposed().transposed()), flags(mask))


def test_expert_stacks_are_never_transposed() -> None:
    with pytest.raises(ValueError, match="plain matrix"):
        UnitMask.from_groups("row", (2, 3, 4), [np.zeros(3, np.bool_)] * 2).transposed()


@few(100)
@given(masks())
def test_an_inverted_mask_marks_the_others(mask: UnitMask) -> None:
    np.testing.assert_array_equal(flags(mask.inverted()), ~flags(mask))


@few(100)
@given(masks())
def test_the_broadcast_flags_are_those_of_all_elements(mask: UnitMask) -> None:
    np.testing.assert_array_equal(np.broadcast_to(mask.broadcast, mask.view).reshape(flags(mask).shape), flags(mask))


@few(200)
@given(runs())
def test_flags_of_a_run_of_rows_broadcast_to_its_elements(run: tuple[UnitMask, int, int]) -> None:
    mask, first, count = run
    expected = flags(mask)[first : first + count]
    np.testing.assert_array_equal(np.broadcast_to(mask.element_flags(first, count), expected.shape), expected)
    of_rows, of_elements = mask.split_flags(first, count)
    assert of_rows.shape == (count,)
    assert of_elements.shape in {(1, mask.view[2]), expected.shape}
    np.testing.assert_array_equal(of_rows[:, None] & of_elements, expected)


@few(200)
@given(runs())
def test_overwrite_puts_zeros_on_marked_elements_of_a_run_of_rows(run: tuple[UnitMask, int, int]) -> None:
    mask, first, count = run
    x = np.arange(1, count * mask.view[2] + 1, dtype=np.uint16).reshape(count, -1)
    marked = flags(mask)[first : first + count]
    expected = np.where(marked, 0, x)
    mask.overwrite(x, first, None)
    np.testing.assert_array_equal(x, expected)


@few(200)
@given(runs())
def test_overwrite_takes_marked_elements_from_another_array(run: tuple[UnitMask, int, int]) -> None:
    mask, first, count = run
    x = np.zeros((count, mask.view[2]), np.float32)
    source = np.arange(1, x.size + 1, dtype=np.float32).reshape(x.shape)
    mask.overwrite(x, first, source)
    np.testing.assert_array_equal(x, np.where(flags(mask)[first : first + count], source, 0))


@few(200)
@given(runs())
def test_select_gives_the_marked_elements_in_order(run: tuple[UnitMask, int, int]) -> None:
    mask, first, count = run
    x = np.arange(count * mask.view[2]).reshape(count, -1)
    taken = mask.select(x, first)
    np.testing.assert_array_equal(taken.reshape(-1), x[flags(mask)[first : first + count]])


@few(200)
@given(masks(), st.data())
def test_count_before_counts_marked_elements_in_memory_order(mask: UnitMask, data: st.DataObject) -> None:
    size = int(np.prod(mask.view))
    positions = data.draw(st.lists(st.integers(0, size), min_size=1, max_size=6))
    flat = flags(mask).reshape(-1)
    expected = [int(np.count_nonzero(flat[:position])) for position in positions]
    assert mask.count_before(np.array(positions, dtype=np.int64)).tolist() == expected


@few(200)
@given(masks(), st.sampled_from([1, 2, 4, 8, 32, 1000]))
def test_a_full_block_has_no_element_that_is_not_marked(mask: UnitMask, block: int) -> None:
    flat = flags(mask).reshape(-1)
    expected = [bool(flat[start : start + block].all()) for start in range(0, flat.size, block)]
    assert mask.full_blocks(block).tolist() == expected


@pytest.mark.parametrize("axis", ["row", "column", "element"])
def test_each_slice_of_a_stack_has_its_own_marks(axis: Any) -> None:
    units = {"row": 2, "column": 3, "element": 6}[axis]
    groups = [np.zeros(units, np.bool_), np.ones(units, np.bool_)]
    marked = flags(UnitMask.from_groups(axis, (2, 2, 3), groups))
    assert not marked[:2].any()
    assert marked[2:].all()
