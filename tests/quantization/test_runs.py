"""Runs of values as block-wise codes: against numpy, against bitsandbytes, and malformed ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedqsn_cli.kernels.jit import NonFinite
from fedqsn_cli.quantization.codebooks import NF4
from fedqsn_cli.quantization.runs import MalformedCodes, decode_run, encode_run
from support.scenario import few

Float32s = NDArray[np.float32]
BLOCKS = {"int8": 256, "nf4": 64}
FORMATS = sorted(BLOCKS)


def run_of(size: int, seed: int, scale: float = 1.0) -> Float32s:
    values = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    values[::13] = 0
    return (values * np.float64(scale)).astype(np.float32)


def decoded(x: Float32s, format: Any, block: int) -> Float32s:
    """What a run of values becomes when it is encoded and decoded."""
    return decode_run(*encode_run(x, format, block), format, block, x.size)


def reference(x: Float32s, format: str) -> Float32s:
    """Nearest level times the largest magnitude of the block, in double precision."""
    levels = np.array(NF4 if format == "nf4" else np.arange(-127, 128) / 127, np.float64)
    out = np.zeros(x.size)
    for start in range(0, x.size, BLOCKS[format]):
        part = x[start : start + BLOCKS[format]].astype(np.float64)
        most = np.abs(part).max()
        if most:
            out[start : start + part.size] = levels[np.abs(part[:, None] / most - levels).argmin(axis=1)] * most
    return out.astype(np.float32)


@few(40)
@given(st.integers(1, 1500), st.integers(0, 99), st.sampled_from([1e-30, 1e-9, 1.0, 1e30]), st.sampled_from(FORMATS))
def test_values_become_the_nearest_level_of_their_block(size: int, seed: int, scale: float, format: Any) -> None:
    x = run_of(size, seed, scale)
    found, wanted = decoded(x, format, BLOCKS[format]), reference(x, format)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=0)


@few(40)
@given(st.integers(1, 1500), st.integers(0, 99), st.sampled_from(FORMATS))
def test_no_value_moves_further_than_half_the_widest_gap_between_levels(size: int, seed: int, format: Any) -> None:
    x, block = run_of(size, seed), BLOCKS[format]
    gap = {"int8": 1 / 254, "nf4": (NF4[1] - NF4[0]) / 2}[format]
    error = np.abs(decoded(x, format, block) - x)
    for start in range(0, size, block):
        part = slice(start, start + block)
        assert error[part].max() <= gap * np.abs(x[part]).max() * (1 + 1e-5)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000, 4097])
def test_nf4_codes_and_scales_are_those_of_bitsandbytes(size: int) -> None:
    from bitsandbytes.functional import quantize_4bit

    x = run_of(size, size, 1e-3)
    codes, scales = encode_run(x, "nf4", 64)
    packed, state = quantize_4bit(torch.from_numpy(x), blocksize=64, quant_type="nf4")
    np.testing.assert_array_equal(codes, packed.numpy().reshape(-1))
    np.testing.assert_array_equal(scales, state.absmax.numpy())


@pytest.mark.parametrize("size", [1, 255, 256, 257, 5000])
def test_int8_scales_are_those_of_bitsandbytes_and_values_the_same_but_for_ties(size: int) -> None:
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    levels = torch.cat([torch.arange(-127, 128) / 127, torch.ones(1)]).float()
    x = run_of(size, size, 1e-3)
    _, scales = encode_run(x, "int8", 256)
    codes, state = quantize_blockwise(torch.from_numpy(x), code=levels, blocksize=256)
    np.testing.assert_array_equal(scales, state.absmax.numpy())
    theirs, mine = dequantize_blockwise(codes, state).numpy(), decoded(x, "int8", 256)
    step = np.repeat(scales, 256)[:size] / 127
    same = np.abs(theirs - mine) <= 1e-3 * step
    assert same.mean() > 0.999
    assert (np.abs(np.abs(theirs - x) - np.abs(mine - x))[~same] < 1e-2 * step[~same]).all()  # both are as near


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_stay_zeros(format: Any) -> None:
    assert not decoded(np.zeros(77, np.float32), format, BLOCKS[format]).any()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(format: Any, value: float) -> None:
    x = run_of(300, 1)
    x[299] = value
    with pytest.raises(NonFinite):
        encode_run(x, format, BLOCKS[format])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, -1.0, -np.nan])
def test_scales_that_no_encoder_writes_are_refused(format: Any, scale: float) -> None:
    codes, scales = encode_run(run_of(300, 1), format, BLOCKS[format])
    scales[-1] = scale
    with pytest.raises(MalformedCodes, match="scale"):
        decode_run(codes, scales, format, BLOCKS[format], 300)


def test_codes_that_no_encoder_writes_are_refused() -> None:
    codes, scales = encode_run(run_of(301, 1), "int8", 256)
    codes[7] = 0x80  # -128
    with pytest.raises(MalformedCodes, match="-127"):
        decode_run(codes, scales, "int8", 256, 301)
    codes, scales = encode_run(run_of(301, 1), "nf4", 64)
    codes[-1] ^= 1
    with pytest.raises(MalformedCodes, match="after the last value"):
        decode_run(codes, scales, "nf4", 64, 301)
