"""The levels of every format."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb

from fedqsn_cli.quantization.codebooks import FORMATS, codebook
from support.reference import bits


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_levels_of_four_bits_are_those_of_bitsandbytes(name: str) -> None:
    theirs = bnb.get_4bit_type(name, device=torch.device("cpu")).numpy()
    assert bits(np.array(FORMATS[name].values, np.float32)) == bits(theirs)


def normal_float(bits_: int) -> np.ndarray:
    n = 2**bits_
    quantile = NormalDist().inv_cdf
    edge = 1 - (1 / (2 * n) + 1 / (2 * (n - 1))) / 2
    up = [quantile(p) for p in np.linspace(edge, 0.5, n // 2 + 1)[:-1]]
    down = [-quantile(p) for p in np.linspace(edge, 0.5, n // 2)[:-1]]
    levels = np.sort(np.array([*up, 0.0, *down]))
    return (levels / levels.max()).astype(np.float32)


@pytest.mark.parametrize("name", ["nf3", "nf2"])
def test_normal_float_levels_are_quantiles_of_the_normal_distribution(name: str) -> None:
    assert np.array_equal(np.array(FORMATS[name].values, np.float32), normal_float(FORMATS[name].bits))


def test_the_same_construction_gives_nf4() -> None:
    assert np.allclose(normal_float(4), FORMATS["nf4"].values, rtol=0, atol=3e-7)


@pytest.mark.parametrize("name", ["nf4", "fp4", "nf3", "nf2"])
def test_a_codebook_has_an_exact_zero_and_reaches_one(name: str) -> None:
    form = FORMATS[name]
    assert len(form.values) == 2**form.bits
    assert form.values[form.zero_code] == 0
    assert max(form.values) == 1
    assert min(form.values) == -1


@pytest.mark.parametrize("name", ["nf4", "fp4", "nf3", "nf2"])
def test_ranks_ascend_and_lead_back_to_codes(name: str) -> None:
    book, form = codebook(name), FORMATS[name]
    count = len(form.values)
    assert (np.diff(book.levels[:count]) >= 0).all()
    assert [form.values[code] for code in book.order[:count]] == book.levels[:count].tolist()
    assert np.isinf(book.bounds[count - 1 :]).all()
    assert book.order[np.searchsorted(book.bounds, np.float32(0), side="left")] == form.zero_code


@pytest.mark.parametrize("name", ["int8", "none"])
def test_formats_without_levels_have_no_codebook(name: str) -> None:
    with pytest.raises(ValueError):
        codebook(name)
