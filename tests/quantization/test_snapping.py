"""Snapping is quantizing and dequantizing each run alone, with +0.0 for every zero."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from bitsandbytes import functional as bnb
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedqsn_cli.quantization import kernels
from support.passes import threads_of
from support.reference import (
    DTYPES,
    bits,
    narrow,
    normals,
    numbers,
    snap_int8_run,
    snap_run,
    stored,
    tensor,
    weights,
    wide,
)

Array = NDArray[Any]
CODEBOOKS = ("nf4", "fp4", "nf3", "nf2")
GEOMETRIES = ("flat", "row", "column")


def snap(x: Array, dtype: str, format: str, geometry: str, block: int = 32) -> Array:
    rows, cols = x.shape
    out = np.empty_like(x)
    kernels.snap(x, dtype, format=format, block=block, geometry=geometry, rows=rows, cols=cols, out=out)
    return out


def expected(x: Array, dtype: str, format: str, geometry: str, block: int) -> Array:
    """Run by run with the short reference."""
    values = wide(x, dtype)
    if geometry == "column":
        values = values.T
    runs = values.reshape(1, -1) if geometry == "flat" and format != "int8" else values
    snapped = [snap_int8_run(run) if format == "int8" else snap_run(run, format, block) for run in runs]
    result = np.stack(snapped).reshape(values.shape)
    return numbers(narrow(result.T if geometry == "column" else result, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("format", [*CODEBOOKS, "int8"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (64, 96), (70, 33), (33, 70)])
def test_each_run_is_on_the_grid_of_its_own_blocks(
    shape: tuple[int, int], format: str, geometry: str, dtype: str
) -> None:
    x = normals(shape[0] * shape[1], dtype, scale=0.02).reshape(shape)
    x[shape[0] // 2] = 0
    assert bits(snap(x, dtype, format, geometry)) == bits(expected(x, dtype, format, geometry, 32))


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("format", ["nf3", "int8"])
@pytest.mark.parametrize("shape", [(700, 210), (40, 3300)])
def test_matrices_of_many_pieces_are_on_the_grid_too(shape: tuple[int, int], format: str, geometry: str) -> None:
    x = normals(shape[0] * shape[1], "BF16").reshape(shape)
    assert bits(snap(x, "BF16", format, geometry)) == bits(expected(x, "BF16", format, geometry, 32))


@pytest.mark.parametrize("format", ["nf3", "int8"])
def test_a_row_longer_than_a_piece_is_on_the_grid_too(format: str) -> None:
    x = normals(140_002, "F32").reshape(2, 70_001)
    assert bits(snap(x, "F32", format, "row", 1024)) == bits(expected(x, "F32", format, "row", 1024))


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_flat_snapping_is_a_round_trip_through_bitsandbytes(dtype: str, format: str) -> None:
    x = normals(1000, dtype).reshape(10, 100)
    codes, state = bnb.quantize_4bit(tensor(x, dtype).view(1, -1), blocksize=64, quant_type=format)
    theirs = stored(bnb.dequantize_4bit(codes, state)).reshape(x.shape)
    assert bits(snap(x, dtype, format, "flat", 64)) == bits(numbers(theirs, dtype))


@settings(max_examples=80, deadline=None)
@given(weights(), st.sampled_from(CODEBOOKS), st.sampled_from(GEOMETRIES), st.integers(1, 9))
def test_any_finite_numbers_equal_the_short_reference(
    case: tuple[Array, str], format: str, geometry: str, cols: int
) -> None:
    x, dtype = case
    rows = -(-x.size // cols)
    x = np.resize(x, (rows, cols))
    assert bits(snap(x, dtype, format, geometry)) == bits(expected(x, dtype, format, geometry, 32))


@settings(max_examples=80, deadline=None)
@given(weights(max_size=60), st.sampled_from(GEOMETRIES))
def test_int8_keeps_numbers_of_any_size_within_half_a_step(case: tuple[Array, str], geometry: str) -> None:
    x, dtype = case
    x = x.reshape(1, -1)
    out = wide(snap(x, dtype, "int8", geometry), dtype).astype(np.float64)
    values = wide(x, dtype).astype(np.float64)
    step = (np.abs(values) if geometry == "column" else np.abs(values).max()) / 127
    least = {"F32": 2.0**-149, "F16": 2.0**-24, "BF16": 2.0**-133}[dtype]
    unit = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}[dtype]
    assert (np.abs(out - values) <= step * (0.5 + 1e-4) + least + np.abs(values) * 2 * unit).all()


@settings(max_examples=60, deadline=None)
@given(weights(), st.sampled_from([*CODEBOOKS, "int8"]), st.sampled_from(GEOMETRIES), st.integers(1, 9))
def test_any_matrix_is_on_the_grid(case: tuple[Array, str], format: str, geometry: str, cols: int) -> None:
    dtype = case[1]
    limit = 2.0**14 if format == "int8" else 2.0**120  # int8's short reference knows no shift
    least = 2.0**-14 if format == "int8" else 0.0
    values = np.resize(wide(*case), (-(-case[0].size // cols), cols))
    values = np.where(np.abs(values) < least, 0, np.clip(values, -limit, limit))
    x = narrow((np.clip(values, -60000, 60000) if dtype == "F16" else values).astype(np.float32), dtype)
    assert bits(snap(x, dtype, format, geometry)) == bits(expected(x, dtype, format, geometry, 32))


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("format", [*CODEBOOKS, "int8"])
def test_what_is_snapped_to_zero_is_positive_zero(format: str, geometry: str) -> None:
    for dtype in DTYPES:
        x = normals(64 * 64, dtype, scale=1e-3).reshape(64, 64)
        x[0, 0] = narrow(np.ones(1, np.float32), dtype)[0]
        x[5:, 5:] = narrow(np.full(1, -0.0, np.float32), dtype)[0]
        out = snap(x, dtype, format, geometry)
        zeros = numbers(out, dtype) == 0
        assert zeros.any()
        assert bits(numbers(out, dtype)) == bits(out)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("format", [*CODEBOOKS, "int8"])
def test_snapping_in_place_gives_the_same(format: str, geometry: str) -> None:
    x = normals(70 * 50, "BF16").reshape(70, 50)
    out = snap(x, "BF16", format, geometry)
    kernels.snap(x, "BF16", format=format, block=32, geometry=geometry, rows=70, cols=50, out=x)
    assert bits(x) == bits(out)


@pytest.mark.parametrize("format", CODEBOOKS)
def test_snapping_twice_changes_nothing(format: str) -> None:
    x = snap(normals(128 * 64, "F32").reshape(128, 64), "F32", format, "row")
    assert bits(snap(x, "F32", format, "row")) == bits(x)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_chunks_give_what_the_whole_matrix_gives(geometry: str) -> None:
    x = normals(200 * 48, "F16").reshape(200, 48)
    whole = snap(x, "F16", "nf4", geometry)
    parts = [snap(x[start : start + 64], "F16", "nf4", geometry) for start in range(0, 200, 64)]
    assert bits(np.concatenate(parts)) == bits(whole)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("format", ["nf3", "int8"])
def test_threads_do_not_change_a_bit(format: str, geometry: str) -> None:
    x = normals(600 * 300, "BF16").reshape(600, 300)
    results = []
    for count in (1, 2, 5):
        with threads_of(count):
            results.append(bits(snap(x, "BF16", format, geometry)))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("format", ["nf3", "int8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused(bad: float, format: str, geometry: str) -> None:
    for dtype in DTYPES:
        x = normals(40 * 40, dtype).reshape(40, 40)
        broken = x.copy()
        broken[39, 39] = narrow(np.full(1, bad, np.float32), dtype)[0]
        with pytest.raises(kernels.NonFinite):
            snap(broken, dtype, format, geometry)


def test_arrays_that_do_not_fit_are_a_bug_of_the_caller() -> None:
    x = np.ones((4, 4), np.float32)
    good: dict[str, Any] = {"format": "nf3", "block": 32, "geometry": "row", "rows": 4, "cols": 4, "out": x}
    for wrong in ({"rows": 5}, {"block": 33}, {"geometry": "diagonal"}, {"format": "none"}, {"out": np.ones(3, "f4")}):
        with pytest.raises(ValueError):
            kernels.snap(x, "F32", **(good | wrong))
    with pytest.raises(ValueError):
        kernels.snap(np.ones((4, 8), np.float32)[:, ::2], "F32", **good)
