"""4-bit codes and scales are those of bitsandbytes on a CPU, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedqsn_cli.kernels.floats import PIECE
from fedqsn_cli.quantization import kernels
from fedqsn_cli.quantization.codebooks import FORMATS
from support.passes import threads_of
from support.reference import BLOCKS, DTYPES, bits, normals, numbers, pack, quantize_run, tensor, unpack, weights, wide

Array = NDArray[Any]
FOUR = ("nf4", "fp4")


def quantize(x: Array, dtype: str, format: str, block: int) -> tuple[Array, Array]:
    packed = np.empty(-(-x.size // 2), np.uint8)
    absmax = np.empty(-(-x.size // block), np.float32)
    kernels.quantize_4bit(x, dtype, format=format, block=block, packed=packed, absmax=absmax)
    return packed, absmax


def assert_equals_bitsandbytes(x: Array, dtype: str, format: str, block: int) -> None:
    packed, absmax = quantize(x, dtype, format, block)
    codes, state = bnb.quantize_4bit(tensor(x, dtype).view(1, -1), blocksize=block, quant_type=format)
    assert bits(packed) == bits(codes.numpy())
    assert bits(absmax) == bits(state.absmax.numpy())
    out = np.empty_like(x)
    kernels.dequantize_4bit(packed, absmax, format=format, block=block, dtype=dtype, out=out)
    # bitsandbytes has a table with a negative zero for fp4's second zero and one without
    theirs = bnb.dequantize_4bit(codes, state).reshape(-1)
    assert torch.equal(tensor(out, dtype), theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FOUR)
@pytest.mark.parametrize("n", [1, 2, 31, 64, 65, 127, 4096, 4097, 3 * 4096 + 70])
def test_codes_scales_and_values_equal_bitsandbytes(n: int, format: str, dtype: str) -> None:
    for block in BLOCKS:
        assert_equals_bitsandbytes(normals(n, dtype, scale=0.02, seed=n), dtype, format, block)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FOUR)
def test_tensors_of_many_pieces_equal_bitsandbytes(format: str, dtype: str) -> None:
    for block in (64, 4096):
        assert_equals_bitsandbytes(normals(3 * PIECE + 4099, dtype), dtype, format, block)


def test_arrays_that_cannot_be_written_are_read() -> None:
    x = normals(1000, "F32")
    x.setflags(write=False)
    assert_equals_bitsandbytes(x, "F32", "nf4", 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FOUR)
@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-38, 1e-8, 6e4, 1e38, 3e38])
def test_subnormal_and_huge_values_equal_bitsandbytes(scale: float, format: str, dtype: str) -> None:
    assert_equals_bitsandbytes(normals(777, dtype, scale=scale), dtype, format, 64)


@settings(max_examples=60, deadline=None)
@given(weights(), st.sampled_from(FOUR), st.sampled_from((32, 64, 128)))
def test_any_finite_numbers_equal_bitsandbytes(case: tuple[Array, str], format: str, block: int) -> None:
    assert_equals_bitsandbytes(*case, format, block)


@settings(max_examples=60, deadline=None)
@given(weights(), st.sampled_from(FOUR), st.sampled_from((32, 64, 128)))
def test_any_finite_numbers_equal_the_short_reference(case: tuple[Array, str], format: str, block: int) -> None:
    x, dtype = case
    codes, scales = quantize_run(wide(x, dtype), format, block)
    packed, absmax = quantize(x, dtype, format, block)
    assert bits(packed) == bits(pack(codes, FORMATS[format].zero_code))
    assert bits(absmax) == bits(scales)


@pytest.mark.parametrize("format", FOUR)
def test_a_value_on_a_midpoint_gets_the_lower_level(format: str) -> None:
    levels = np.sort(np.array(FORMATS[format].values, np.float32))
    middles = (levels[:-1] + levels[1:]) / np.float32(2)
    x = np.concatenate([middles, np.nextafter(middles, np.float32(2)), np.nextafter(middles, np.float32(-2))])
    x = np.pad(x, (0, 64 - x.size), constant_values=1)
    assert_equals_bitsandbytes(x, "F32", format, 64)
    codes = unpack(quantize(x, "F32", format, 64)[0], 64)
    chosen = np.array(FORMATS[format].values, np.float32)[codes[:15]]
    assert (chosen == levels[:-1]).all()


@pytest.mark.parametrize("format", FOUR)
def test_a_block_of_zeros_gets_zero_codes_and_scale_zero(format: str) -> None:
    x = np.zeros(128, np.float32)
    x[::2] = -0.0
    packed, absmax = quantize(x, "F32", format, 64)
    assert (unpack(packed, 128) == FORMATS[format].zero_code).all()
    assert bits(absmax) == bits(np.zeros(2, np.float32))
    out = np.empty_like(x)
    kernels.dequantize_4bit(packed, absmax, format=format, block=64, dtype="F32", out=out)
    assert bits(out) == bits(np.zeros(128, np.float32))


def test_a_short_block_of_zeros_keeps_the_scale_that_bitsandbytes_gives_it() -> None:
    assert_equals_bitsandbytes(np.zeros(70, np.float32), "F32", "nf4", 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 63, 64, 99])
def test_a_value_that_is_not_finite_is_refused(dtype: str, bad: float, where: int) -> None:
    x = tensor(normals(100, dtype), dtype).clone()
    x[where] = bad
    raw = x.numpy() if dtype == "F32" else x.view(torch.int16).numpy().view(np.uint16)
    with pytest.raises(kernels.NonFinite):
        quantize(raw, dtype, "nf4", 64)


def test_a_scale_that_is_not_finite_is_refused() -> None:
    packed, absmax = np.zeros(32, np.uint8), np.array([np.nan], np.float32)
    with pytest.raises(kernels.NonFinite):
        kernels.dequantize_4bit(packed, absmax, format="nf4", block=64, dtype="F32", out=np.empty(64, np.float32))


@pytest.mark.parametrize("format", FOUR)
def test_chunks_of_whole_blocks_give_what_the_whole_tensor_gives(format: str) -> None:
    x = normals(1000, "BF16")
    packed, absmax = quantize(x, "BF16", format, 64)
    parts = [quantize(x[start : start + 192], "BF16", format, 64) for start in range(0, 1000, 192)]
    assert bits(np.concatenate([part[0] for part in parts])) == bits(packed)
    assert bits(np.concatenate([part[1] for part in parts])) == bits(absmax)


def test_threads_do_not_change_a_bit() -> None:
    x = normals(400_001, "BF16")
    results = []
    for count in (1, 2, 5):
        with threads_of(count):
            packed, absmax = quantize(x, "BF16", "nf4", 64)
            out = np.empty_like(x)
            kernels.dequantize_4bit(packed, absmax, format="nf4", block=64, dtype="BF16", out=out)
        results.append((bits(packed), bits(absmax), bits(out)))
    assert results[0] == results[1] == results[2]


@settings(max_examples=40, deadline=None)
@given(weights(), weights(), st.sampled_from(FOUR))
def test_given_scales_are_used_and_their_reach_clamps(
    case: tuple[Array, str], other: tuple[Array, str], format: str
) -> None:
    x, dtype = case
    n = min(x.size, other[0].size)
    x = x[:n].copy()
    _, absmax = quantize(other[0][:n].copy(), other[1], format, 32)
    packed = np.empty(-(-n // 2), np.uint8)
    kernels.quantize_4bit_with(x, dtype, format=format, block=32, absmax_given=absmax, packed=packed)
    codes, _ = quantize_run(wide(x, dtype), format, 32, absmax)
    assert bits(packed) == bits(pack(codes, FORMATS[format].zero_code))


def test_own_scales_given_back_give_the_same_codes() -> None:
    x = normals(1000, "F16")
    packed, absmax = quantize(x, "F16", "nf4", 64)
    again = np.empty_like(packed)
    kernels.quantize_4bit_with(x, "F16", format="nf4", block=64, absmax_given=absmax, packed=again)
    assert bits(again) == bits(packed)


def test_dequantizing_rounds_once_to_even() -> None:
    packed = np.arange(256, dtype=np.uint8)
    absmax = np.random.default_rng(0).random(8, np.float32)
    exact = np.empty(512, np.float32)
    kernels.dequantize_4bit(packed, absmax, format="nf4", block=64, dtype="F32", out=exact)
    for dtype in ("F16", "BF16"):
        out = np.empty(512, np.uint16)
        kernels.dequantize_4bit(packed, absmax, format="nf4", block=64, dtype=dtype, out=out)
        rounded = torch.from_numpy(exact).to(tensor(out, dtype).dtype)
        assert (numbers(out, dtype) == numbers(rounded.view(torch.int16).numpy().view(np.uint16), dtype)).all()


@pytest.mark.parametrize(
    "wrong",
    [{"block": 48}, {"format": "nf3"}, {"packed": np.empty(3, np.uint8)}, {"absmax": np.empty(3, np.float32)}],
)
def test_arrays_that_do_not_fit_are_a_bug_of_the_caller(wrong: dict[str, Any]) -> None:
    good = {"format": "nf4", "block": 64, "packed": np.empty(32, np.uint8), "absmax": np.empty(1, np.float32)}
    with pytest.raises(ValueError):
        kernels.quantize_4bit(np.ones(64, np.float32), "F32", **(good | wrong))
