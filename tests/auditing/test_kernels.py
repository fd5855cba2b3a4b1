"""Compiled arithmetic of the audit against the same in numpy, element by element."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedqsn_cli.auditing import kernels
from fedqsn_cli.auditing.invariants.sketches import of_columns, of_rows, signs, window
from fedqsn_cli.auditing.recovery.metrics import COUNT, HITS, ErrorSums
from fedqsn_cli.auditing.stored_rows import StoredRows
from fedqsn_cli.kernels.jit import KIND
from fedqsn_cli.quantization.bnb_format import Packing
from fedqsn_cli.quantization.codebooks import FORMATS, codebook
from fedqsn_cli.quantization.kernels import narrowed, widened

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


@pytest.mark.parametrize("lines", [1, SHAPE[0]])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize(("cols", "skipped"), [(130, 4), (129, 7)])
def test_a_guess_is_worth_the_same_as_codes_and_as_values(dtype: str, lines: int, cols: int, skipped: int) -> None:
    """Rows begin and end within blocks, and within a byte of codes."""
    chance, shape, divisor = np.random.default_rng(0), (5, cols), np.float32(1.25)
    bits = narrowed(chance.standard_normal(shape).astype(np.float32), dtype).reshape(shape)
    w, size = widened(bits, dtype).reshape(shape), skipped + 5 * cols
    packing = Packing("pack4", "nf4", dtype, shape, 32, False, ())
    packed = chance.integers(0, 256, -(-size // 2), dtype=np.uint8)
    scales = chance.random(-(-size // 32)).astype(np.float32) * divisor
    codes = StoredRows(*shape, packed, "U8", packing, scales, skipped)
    shown = chance.random(5) < 0.7, (chance.random((lines, cols)) < 0.6).astype(np.float32)
    a, b = (
        np.where(shown[0][:, None] & (shown[1] > 0), x, 0).astype(np.float64) for x in (w, codes.values() / divisor)
    )
    flags = shown[0][:, None] * np.broadcast_to(shown[1], shape)
    exact = flags * (np.abs(a - b) <= 0.1 * np.abs(a))
    wanted = [x.sum() for x in (flags, a, a * a, b, b * b, (a - b) ** 2, exact, b * b)]
    for guess in (codes, StoredRows.of(codes.values())):
        found = ErrorSums()
        found.add(StoredRows.of(bits, dtype), guess, shown, divisor=divisor, tolerance=0.1)
        np.testing.assert_allclose(found.values, wanted, rtol=1e-5)
    assert 0 < found[HITS] < found[COUNT]


def test_only_the_largest_values_of_blocks_are_certain() -> None:
    sent, peaks = np.random.default_rng(0).standard_normal((2, 600)).astype(np.float32)
    out, divisor = np.empty_like(sent), np.float32(1.1)
    kernels.largest_values(sent, peaks, divisor, KIND["BF16"], out)
    rounded = widened(narrowed(sent / divisor, "BF16"), "BF16")
    np.testing.assert_array_equal(out, np.where(np.abs(sent) >= peaks, rounded, np.float32(np.nan)))


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_projections_are_products_sums_and_squares(dtype: str) -> None:
    x = np.random.default_rng(0).standard_normal((40, 600)).astype(np.float32)
    bits = narrowed(x, dtype).reshape(x.shape)
    wide = widened(bits, dtype).reshape(x.shape)
    low, high = window(600)
    for part, planes, found in (
        (wide[:, low:high], signs(256), of_rows(bits, dtype)),
        (wide[7:31].T, signs(40)[3:27], of_columns(bits[7:31], dtype, 3, 40)),
    ):
        wanted = np.column_stack([part @ planes, part.sum(axis=1), np.square(part).sum(axis=1)])
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)


def test_a_vector_and_its_negative_are_in_one_cell() -> None:
    chance = np.random.default_rng(0)
    vectors, planes = chance.standard_normal((500, 16)).astype(np.float32), np.eye(16, dtype=np.float32)
    cells, other = np.empty(500, np.uint16), np.empty(500, np.uint16)
    kernels.cells_of(vectors, planes, cells)
    kernels.cells_of(-vectors, planes, other)
    sides = (vectors > 0) ^ (vectors[:, :1] > 0)
    np.testing.assert_array_equal(cells, sides @ (1 << np.arange(15, -1, -1)))
    np.testing.assert_array_equal(other, cells)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_guess_is_moved_into_its_interval() -> None:
    guess, low, high, total = (drawn(seed, (600,)) for seed in range(4))
    count, out = np.arange(600, dtype=np.float32) % 3, np.empty(600, np.float32)
    kernels.clamp(guess, low, high, total, count, out)
    inside = np.minimum(np.maximum(guess, low), high)
    np.testing.assert_array_equal(out, np.where(low <= high, inside, total / np.maximum(count, np.float32(1))))
