"""Quantized block scales are those of bitsandbytes' double quantization on a CPU, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import given, settings
from hypothesis import strategies as st

from fedqsn_cli.quantization import kernels
from fedqsn_cli.quantization.codebooks import dynamic_map
from fedqsn_cli.quantization.nested import nearest_codes
from support.hardware import fused_dynamic_map, linspace_is_fused
from support.reference import bits


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """With more threads torch adds long arrays in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def fused_map() -> Iterator[None]:
    with fused_dynamic_map():
        yield


def assert_equals_bitsandbytes(absmax: np.ndarray) -> None:
    ours = kernels.double_quantize(absmax)
    scales = torch.from_numpy(absmax)
    offset = scales.mean()
    codes, state = bnb.quantize_blockwise(scales - offset, blocksize=256)
    assert bits(np.array(ours.offset)) == bits(offset.numpy())
    assert bits(ours.codes) == bits(codes.numpy())
    assert bits(ours.nested_absmax) == bits(state.absmax.numpy())
    assert bits(ours.nested_map) == bits(state.code.numpy())
    theirs = bnb.dequantize_blockwise(codes, state) + offset
    assert bits(kernels.double_dequantize(ours)) == bits(theirs.numpy())


@pytest.mark.parametrize("n", [*range(1, 40), 255, 256, 257, 1000, 4096, 5000, 32767, 32768, 100_003])
def test_codes_scales_and_offset_equal_bitsandbytes(n: int) -> None:
    absmax = np.abs(np.random.default_rng(n).standard_normal(n)).astype(np.float32)
    assert_equals_bitsandbytes(absmax * np.float32(0.05))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=700))
def test_any_scales_equal_bitsandbytes(scales: list[float]) -> None:
    assert_equals_bitsandbytes(np.array(scales, np.float32))


def test_every_cell_of_the_table_equals_bitsandbytes() -> None:
    values = np.linspace(-1, 1, 200_001, dtype=np.float32)
    values = np.concatenate([values, np.nextafter(values, np.float32(0))])
    rows = np.ones((-(-values.size // 255), 256), np.float32)  # each block holds a 1, so its scale is 1
    rows[:, 1:].reshape(-1)  # a view would not be contiguous: fill by rows
    for row, start in zip(rows, range(0, values.size, 255), strict=True):
        part = values[start : start + 255]
        row[1 : 1 + part.size] = part
    theirs, _ = bnb.quantize_blockwise(torch.from_numpy(rows), blocksize=256)
    zero = kernels.DoubleQuantized(np.empty(0, np.uint8), np.ones(len(rows), np.float32), dynamic_map(), np.float32(0))
    assert bits(nearest_codes(rows.reshape(-1), zero)) == bits(theirs.numpy().reshape(-1))


def test_the_dynamic_map_is_that_of_bitsandbytes() -> None:
    """Bit for bit where torch.linspace rounds once; elsewhere its own levels are off by units in the last place."""
    theirs = bnb.create_dynamic_map().numpy()
    if linspace_is_fused():
        assert bits(dynamic_map()) == bits(theirs)
    np.testing.assert_array_max_ulp(dynamic_map(), theirs, 2)


@pytest.mark.parametrize("value", [0.0, 1e-45, 0.3, 3e38])
def test_equal_scales_come_back_as_they_were(value: float) -> None:
    absmax = np.full(300, value, np.float32)
    with np.errstate(over="ignore"):
        if not np.isfinite(absmax.sum(dtype=np.float32)):
            with pytest.raises(kernels.NonFinite):
                kernels.double_quantize(absmax)
            return
    assert_equals_bitsandbytes(absmax)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_scale_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(kernels.NonFinite):
        kernels.double_quantize(np.array([1, bad], np.float32))
