"""The shape of an update: the table of the module, example by example."""

from __future__ import annotations

import pytest

from fedqsn_cli.artifacts.update_folder import update_shape

Shape = tuple[int, ...]
View = tuple[int, int, int]

SHAPES: dict[str, tuple[Shape, str | None, View, int, Shape]] = {
    "a norm": ((8,), None, (1, 8, 1), 8, (8,)),
    "rows of a linear layer": ((8, 4), "row", (1, 8, 4), 5, (5, 4)),
    "its bias": ((8,), "row", (1, 8, 1), 5, (5,)),
    "columns of an embedding": ((9, 4), "column", (1, 9, 4), 3, (9, 3)),
    "rows of an expert stack": ((2, 8, 4), "row", (2, 8, 4), 10, (2, 5, 4)),
    "columns of an expert stack": ((2, 8, 4), "column", (2, 8, 4), 6, (2, 8, 3)),
    "a bias for each expert": ((2, 8), "row", (2, 8, 1), 10, (2, 5)),
    "single weights": ((8, 4), "element", (1, 8, 4), 20, (20,)),
    "single weights of an expert stack": ((2, 8, 4), "element", (2, 8, 4), 40, (40,)),
    "one row": ((1, 4), "row", (1, 1, 4), 1, (1, 4)),
}


@pytest.mark.parametrize("case", SHAPES)
def test_an_update_has_the_shape_of_the_tensor_with_its_visible_units(case: str) -> None:
    shape, axis, view, visible, expected = SHAPES[case]
    assert update_shape(shape, axis, view, visible) == expected
