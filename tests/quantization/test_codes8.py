"""int8 codes and scales are those of bitsandbytes on a CPU, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Int8Params
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedqsn_cli.quantization import kernels
from support.reference import DTYPES, TORCH, bits, narrow, normals, stored, tensor

Array = NDArray[Any]


def quantize(x: Array, dtype: str) -> tuple[Array, Array]:
    codes, scb = np.empty(x.shape, np.int8), np.empty(x.shape[0], np.float32)
    kernels.quantize_int8(x, dtype, codes, scb)
    return codes, scb


def assert_equals_bitsandbytes(x: Array, dtype: str) -> None:
    codes, scb = quantize(x, dtype)
    theirs = Int8Params(tensor(x, dtype), has_fp16_weights=False, requires_grad=False).to("cpu")
    assert bits(codes) == bits(theirs.CB.numpy())
    assert bits(scb) == bits(theirs.SCB.numpy())
    for out_dtype in DTYPES:
        out = np.empty(x.shape, np.float32 if out_dtype == "F32" else np.uint16)
        kernels.dequantize_int8(codes, scb, out_dtype, out)
        values = bnb.int8_vectorwise_dequant(theirs.CB, theirs.SCB).to(TORCH[out_dtype])
        assert bits(out) == bits(stored(values))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-6, 0.02, 1.0, 1e4])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (64, 64), (70, 513), (300, 700), (3, 70_000)])
def test_codes_scales_and_values_equal_bitsandbytes(shape: tuple[int, int], scale: float, dtype: str) -> None:
    x = normals(shape[0] * shape[1], dtype, scale=scale).reshape(shape)
    x[:, 0] = narrow(np.full(1, scale, np.float32), dtype)  # no row of zeros, where bitsandbytes divides 0 by 0
    assert_equals_bitsandbytes(x, dtype)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 0x7BFF), min_size=1, max_size=60), st.integers(1, 0x7BFF))
def test_any_fp16_row_equals_bitsandbytes(magnitudes: list[int], last: int) -> None:
    row = np.array([*magnitudes, last], np.uint16)
    row[::2] |= 0x8000
    assert_equals_bitsandbytes(row.reshape(1, -1), "F16")


def test_halves_are_rounded_to_even() -> None:
    x = np.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5]], np.float32)
    assert quantize(x, "F32")[0].tolist() == [[127, 0, 2, 2, 0, -2, 126]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_zeros_gets_zero_codes_and_scale_zero(dtype: str) -> None:
    x = normals(3 * 8, dtype).reshape(3, 8)
    x[1] = 0
    codes, scb = quantize(x, dtype)
    assert not codes[1].any()
    assert bits(scb[1:2]) == bits(np.zeros(1, np.float32))
    out = np.empty_like(x)
    kernels.dequantize_int8(codes, scb, dtype, out)
    assert not out[1].any() if dtype != "F32" else bits(out[1]) == bits(np.zeros(8, np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 65520.0, -1e30])
def test_a_value_beyond_fp16_is_refused(bad: float) -> None:
    with pytest.raises(kernels.NonFinite):
        quantize(np.array([[1.0, bad]], np.float32), "F32")


def test_the_largest_value_that_rounds_into_fp16_is_kept() -> None:
    codes, scb = quantize(np.array([[65519.0, -1.0]], np.float32), "F32")
    assert (codes.tolist(), scb.tolist()) == ([[127, 0]], [65504.0])


def test_a_scale_that_is_not_finite_is_refused() -> None:
    with pytest.raises(kernels.NonFinite):
        kernels.dequantize_int8(
            np.zeros((1, 2), np.int8), np.array([np.inf], np.float32), "F32", np.empty((1, 2), np.float32)
        )


def test_rows_in_chunks_give_what_the_whole_matrix_gives() -> None:
    x = normals(100 * 33, "BF16").reshape(100, 33)
    codes, scb = quantize(x, "BF16")
    parts = [quantize(x[start : start + 7], "BF16") for start in range(0, 100, 7)]
    assert bits(np.concatenate([part[0] for part in parts])) == bits(codes)
    assert bits(np.concatenate([part[1] for part in parts])) == bits(scb)


def test_arrays_that_do_not_fit_are_a_bug_of_the_caller() -> None:
    with pytest.raises(ValueError):
        kernels.quantize_int8(np.ones((2, 3), np.float32), "F32", np.empty((3, 2), np.int8), np.empty(2, np.float32))
    with pytest.raises(ValueError):
        kernels.quantize_int8(np.ones((2, 3), np.float32), "BF16", np.empty((2, 3), np.int8), np.empty(2, np.float32))


def test_bitsandbytes_divides_zero_by_zero_where_we_do_not() -> None:
    theirs = bnb.int8_vectorwise_quant(torch.zeros(1, 4, dtype=torch.float16))
    assert theirs[1].item() == 0
