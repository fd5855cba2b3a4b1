"""Compiled arithmetic of the audit against the same in numpy, element by element."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedqsn_cli.auditing import kernels
from fedqsn_cli.quantization.codebooks import FORMATS, codebook

Floats = NDArray[np.float32]
SHAPE = (5, 130)


def drawn(seed: int, shape: tuple[int, ...] = SHAPE) -> Floats:
    """Numbers, some of which are zero, infinite or none."""
    chance = np.random.Generator(np.random.Philox(seed))
    x: Any = chance.standard_normal(shape).astype(np.float32)
    return np.asarray(np.where(chance.random(shape) < 0.1, chance.choice([0, np.inf, -np.inf, np.nan], shape), x), "f4")


@pytest.mark.parametrize("format", ["nf4", "nf3", "nf2", "fp4"])
def test_cells_of_snapped_values(format: str) -> None:
    book, count = codebook(format), len(FORMATS[format].values)
    bounds = np.concatenate([[-1], book.bounds[: count - 1], [1]]).astype(np.float32)
    peaks = np.repeat(np.linspace(0, 3, 10, dtype=np.float32), 64)
    sent = np.tile(book.levels[:count], 640)[:640] * peaks * np.float32(1.001)
    sent[::7] *= np.float32(0.8)
    low, high = np.empty_like(sent), np.empty_like(sent)
    kernels.snapped_cells(sent, peaks, bounds, book.levels, low, high)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(peaks > 0, sent / peaks, np.float32(0))
    rank = np.searchsorted(bounds[1:-1], share)
    off = np.abs(share - book.levels[rank]) > np.float32(0.02)
    np.testing.assert_array_equal(low, np.where(off, -np.inf, (bounds[rank] - np.float32(0.01)) * peaks))
    np.testing.assert_array_equal(high, np.where(off, np.inf, (bounds[rank + 1] + np.float32(0.01)) * peaks))
    assert off.any() and not off.all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("lines", [1, SHAPE[0]])
def test_a_reading_is_added_where_it_shows_something(lines: int) -> None:
    values, certain, low, high = map(drawn, range(4))
    row_flags, flags = drawn(5, SHAPE[:1]) > -0.5, np.asarray(drawn(6, (lines, SHAPE[1])) > 0, np.float32)
    first, total, lowest, highest, edge = map(drawn, range(7, 12))
    count = np.asarray(drawn(12) > 0, np.float32)
    shown = row_flags[:, None] & (flags > 0)
    at_end = shown & ((values >= high) | (values <= low)) & ~np.isnan(certain)
    wanted = (
        np.where(shown & (count == 0), values, first),
        np.where(shown, total + values, total),
        count + shown,
        np.where(shown, np.maximum(lowest, low), lowest),
        np.where(shown, np.minimum(highest, high), highest),
        np.where(at_end & ~(np.abs(edge) <= np.abs(certain)), certain, edge),
    )
    found = first, total, count, lowest, highest, edge
    kernels.add_reading(values, certain, low, high, row_flags, flags, *found)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_guess_is_moved_into_its_interval() -> None:
    guess, low, high, total = (drawn(seed, (600,)) for seed in range(4))
    count, out = np.arange(600, dtype=np.float32) % 3, np.empty(600, np.float32)
    kernels.clamp(guess, low, high, total, count, out)
    inside = np.minimum(np.maximum(guess, low), high)
    np.testing.assert_array_equal(out, np.where(low <= high, inside, total / np.maximum(count, np.float32(1))))
