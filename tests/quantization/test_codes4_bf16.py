"""nf4 codes of bf16 values, by 16-bit comparisons, are those of the same values in fp32, by division and 15 bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedqsn_cli.quantization import kernels
from fedqsn_cli.quantization.codebooks import BLOCK_SIZES, codebook
from support.reference import bits

Words = NDArray[np.uint16]

BLOCK = 128
LARGEST = 0x7F7F  # of all finite magnitudes, as bf16 stores them


def quantize(x: NDArray[Any], dtype: str, block: int) -> tuple[bytes, bytes]:
    packed, absmax = np.empty(-(-x.size // 2), np.uint8), np.empty(-(-x.size // block), np.float32)
    kernels.quantize_4bit(x, dtype, format="nf4", block=block, packed=packed, absmax=absmax)
    return bits(packed), bits(absmax)


def assert_same_as_fp32(x: Words, block: int) -> None:
    wide = (x.astype(np.uint32) << 16).view(np.float32)
    assert quantize(x, "BF16", block) == quantize(wide, "F32", block)


def near_bounds(absmax: Words) -> Words:
    """One block for each largest magnitude: itself, and the four bf16 values around every bound, [n, BLOCK]."""
    scale = (absmax.astype(np.uint32) << 16).view(np.float32)
    products = (scale[:, None] * codebook("nf4").bounds).view(np.uint32) >> 16
    around = products[:, :, None].astype(np.int64) + np.arange(-2, 2)
    found = np.zeros((absmax.size, BLOCK), np.uint16)
    magnitude = np.clip(around & 0x7FFF, 0, absmax[:, None, None])
    found[:, : around[0].size] = (magnitude | around & 0x8000).reshape(absmax.size, -1)
    found[:, -2], found[:, -1] = absmax, 0x8000
    return found


def test_values_around_every_bound_of_every_scale_get_the_code_of_fp32() -> None:
    assert_same_as_fp32(near_bounds(np.arange(LARGEST + 1, dtype=np.uint16)).reshape(-1), BLOCK)


def test_every_value_within_a_scale_gets_the_code_of_fp32() -> None:
    magnitudes = np.arange(0x3FB5 + 1, dtype=np.uint16)  # up to 1.4140625
    rows = np.concatenate([magnitudes, magnitudes | 0x8000])
    blocks = np.full((-(-rows.size // (BLOCK - 1)), BLOCK), 0x3FB5, np.uint16)
    blocks[:, 1:] = np.resize(rows, blocks[:, 1:].shape)
    assert_same_as_fp32(blocks.reshape(-1), BLOCK)


@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_any_bits_get_the_code_of_fp32_with_a_shorter_block_at_the_end(block: int) -> None:
    x = np.random.default_rng(block).integers(0, 1 << 16, 9 * block + 7).astype(np.uint16)
    x[x & 0x7FFF > LARGEST] = 0
    assert_same_as_fp32(x, block)


@pytest.mark.parametrize("flaw", [0x7F80, 0xFF80, 0x7FC0])
def test_values_that_are_not_finite_are_refused(flaw: int) -> None:
    x = np.zeros(4 * BLOCK, np.uint16)
    x[BLOCK + 3] = flaw
    with pytest.raises(kernels.NonFinite):
        quantize(x, "BF16", BLOCK)
