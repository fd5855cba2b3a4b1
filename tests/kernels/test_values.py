"""Finite or not, scaled, widened and narrowed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedqsn_cli.quantization import kernels
from support.reference import DTYPES, bits, narrow, normals, stored, tensor, weights, wide


@settings(max_examples=80, deadline=None)
@given(weights(), st.floats(2.0**-20, 2.0**20, width=32))
def test_scaling_is_one_product_and_one_rounding(case: tuple[np.ndarray, str], factor: float) -> None:
    x, dtype = case
    out = np.empty_like(x)
    kernels.scale_values(x, dtype, np.float32(factor), out)
    should = (tensor(x, dtype).float() * torch.tensor(factor, dtype=torch.float32)).to(tensor(x, dtype).dtype)
    assert bits(out) == bits(stored(should))


def test_scaling_in_place_gives_the_same() -> None:
    x = normals(3000, "F16")
    out = np.empty_like(x)
    kernels.scale_values(x, "F16", np.float32(1.7), out)
    kernels.scale_values(x, "F16", np.float32(1.7), x)
    assert bits(x) == bits(out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 1, 70_000, 200_000])
def test_one_value_that_is_not_finite_is_found(where: int, bad: float, dtype: str) -> None:
    x = normals(200_001, dtype, scale=1e30)
    assert kernels.all_finite(x, dtype)
    x[where] = narrow(np.full(1, bad, np.float32), dtype)[0]
    assert not kernels.all_finite(x, dtype)


def test_nothing_is_finite() -> None:
    assert kernels.all_finite(np.empty((0, 3), np.float32), "F32")


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_all_16_bit_numbers_widen_and_narrow_back(dtype: str) -> None:
    x = np.arange(65536, dtype=np.uint16)
    x = x[np.isfinite(wide(x, dtype))]
    assert bits(kernels.widened(x, dtype)) == bits(wide(x, dtype))
    assert bits(kernels.narrowed(kernels.widened(x, dtype), dtype)) == bits(x)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_narrowing_rounds_to_nearest_even_and_overflows_to_infinity(dtype: str) -> None:
    raw = np.random.default_rng(0).integers(0, 2**32, 400_000, dtype=np.uint32)
    middles = (
        (np.arange(0x8000, dtype=np.uint32) << 16) + 0x8000
        if dtype == "BF16"
        else (wide(np.arange(0x7C00, dtype=np.uint16), "F16").view(np.uint32) + (1 << 12))
    )
    x = np.concatenate([raw, middles, middles - 1, middles + 1]).astype(np.uint32).view(np.float32)
    x = x[np.isfinite(x)]
    assert bits(kernels.narrowed(x, dtype)) == bits(narrow(x, dtype))


def test_arrays_that_do_not_fit_are_a_bug_of_the_caller() -> None:
    with pytest.raises(ValueError):
        kernels.scale_values(np.ones(3, np.float32), "F32", np.float32(1), np.empty(4, np.float32))
    with pytest.raises(ValueError):
        kernels.all_finite(np.ones(3, np.float64), "F32")
