"""The shape of an update and of its codes: the tables of the module, example by example."""

from __future__ import annotations

from typing import get_args

import pytest

from fedqsn_cli.artifacts.manifests import UpdateManifest
from fedqsn_cli.artifacts.update_folder import UPDATE_FORMATS, format_of, require_distinct, stored_specs, update_shape
from fedqsn_cli.errors import InputError
from fedqsn_cli.options.groups import UpdateFormat

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


def test_options_manifest_and_table_know_the_same_formats() -> None:
    assert set(get_args(UpdateFormat)) == set(UPDATE_FORMATS)
    assert set(get_args(UpdateManifest.model_fields["precision"].annotation)) == set(UPDATE_FORMATS)


STORED: dict[str, tuple[str, Shape, list[tuple[str, Shape]]]] = {
    "plain values": ("bf16", (5, 4), [("BF16", (5, 4))]),
    "int8 codes": ("int8", (5, 100), [("I8", (5, 100)), ("F32", (2,))]),
    "an expert stack": ("int8", (2, 5, 4), [("I8", (2, 5, 4)), ("F32", (1,))]),
    "nf4 codes": ("nf4", (5, 13), [("U8", (33,)), ("F32", (2,))]),
    "one code": ("nf4", (1, 1), [("U8", (1,)), ("F32", (1,))]),
}


@pytest.mark.parametrize("case", STORED)
def test_codes_have_a_scale_a_block_and_lie_two_in_a_byte_if_they_fit(case: str) -> None:
    form, shape, expected = STORED[case]
    specs = stored_specs("w", UPDATE_FORMATS[form], shape)
    assert [(spec.dtype, spec.shape) for spec in specs] == expected
    assert [spec.name for spec in specs] == ["w", "w.absmax"][: len(specs)]


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_tensors_of_one_dimension_are_not_coded(form: str) -> None:
    assert format_of(form, (8,)).dtype == "F32"
    assert format_of(form, (8, 1)).coding is not None


def test_a_name_for_a_tensor_and_for_scales_at_once_is_refused() -> None:
    specs = [spec for name in ("w", "w.absmax") for spec in stored_specs(name, UPDATE_FORMATS["nf4"], (2, 2))]
    with pytest.raises(InputError, match="a tensor w.absmax"):
        require_distinct(specs)
