"""Attacks on weights, as tables: what an attacker makes of the elements he was shown, and of those he was not.

    shown       as sent      the proxy's values as they are
                descale      divided by n / |V|, which the shape of the mask gives away
                union        of several proxies the first that shows an element
                average      the mean over all proxies that show it: undoes rounding that differs between them
                intersect    every rounded value says in which interval the weight lies; the middle of what is left
    scale reading  as intersect, but an element whose level is 1 attains the scale of its block: it is the scale. Where
                 several share that level, one of them is, and the others lie in their intervals
                clamp        the public base, moved into that interval
                low-rank     base + the leading singular directions of the visible difference, moved into the interval
    hidden      zero, mean (of the tensor's shown elements), base (the same element of the public base)

The element that attains a block's scale is known exactly ("scale reading"): its level is 1, so descaling shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.auditing.kernels import share_edges
from fedqsn_cli.auditing.recovery.metrics import COUNT, G, Sums, constant_guess

Floats = NDArray[np.float32]

AS_SENT, LOW_RANK, SCALE_READING = "as sent", "low-rank", "scale reading"


@dataclass(slots=True)
class Evidence:
    """What several proxies say about the same rows, [rows, cols] each; NaN and infinity where they say nothing.

    Args:
        first: the first value that was shown. total, count: sum and number of shown values.
        low, high: ends of the interval that all rounded values leave.
        edge: the least scale that an element seemed to attain, with its sign; NaN where it never did.
        block: elements that share a scale, in C order; 1 where units share none.
    """

    first: Floats
    total: Floats
    count: Floats
    low: Floats
    high: Floats
    edge: Floats
    block: int

    @classmethod
    def none(cls, shape: tuple[int, int], block: int = 1) -> Evidence:
        """Nothing was shown yet."""
        zeros = np.zeros(shape, np.float32)
        infinite = np.full(shape, np.inf, np.float32)
        return cls(
            zeros, zeros.copy(), zeros.copy(), np.negative(infinite), infinite, infinite * np.float32("nan"), block
        )

    def add(self, values: Floats, low: Floats, high: Floats, shown: NDArray[np.bool_], certain: Floats) -> None:
        """One more proxy: descaled values, the intervals they stand for, where it shows anything, what is certain."""
        new = shown & (self.count == 0)
        np.copyto(self.first, values, where=new)
        np.add(self.total, values, out=self.total, where=shown)
        self.count += shown
        np.maximum(self.low, low, out=self.low, where=np.broadcast_to(shown, low.shape))
        np.minimum(self.high, high, out=self.high, where=np.broadcast_to(shown, high.shape))
        with np.errstate(invalid="ignore"):
            at_end = shown & ((values >= high) | (values <= low)) & ~np.isnan(certain)
            nearer = at_end & ~(np.abs(self.edge) <= np.abs(certain))
        np.copyto(self.edge, certain, where=nearer)

    @property
    def mean(self) -> Floats:
        """Mean of what was shown."""
        return np.asarray(self.total / np.maximum(self.count, np.float32(1)), np.float32)

    def clamped(self, guess: Floats) -> Floats:
        """A guess moved into the intervals; where intervals exclude each other, the mean of what was shown."""
        inside = np.minimum(np.maximum(guess, self.low), self.high)
        return np.where(self.low <= self.high, inside, self.mean)


def first(evidence: Evidence, base: Floats | None) -> Floats:
    """descale, union."""
    return evidence.first


def average(evidence: Evidence, base: Floats | None) -> Floats:
    """The mean over proxies."""
    return evidence.mean


def intersect(evidence: Evidence, base: Floats | None) -> Floats:
    """The middle of the interval, where it is bounded and not empty; else the mean."""
    with np.errstate(invalid="ignore"):
        middle = (evidence.low + evidence.high) / 2
    sound = (evidence.low <= evidence.high) & np.isfinite(middle)
    return np.where(sound, middle, evidence.mean).astype(np.float32)


def read_scales(evidence: Evidence, base: Floats | None) -> Floats:
    """Scale reading: the edge, shared between the elements of a block that may attain the same scale."""
    guess = intersect(evidence, base)
    share_edges(known_edges(evidence).reshape(-1), evidence.block, guess.reshape(-1))
    return guess


def known_edges(evidence: Evidence) -> Floats:
    """Edges that no interval excludes; NaN elsewhere."""
    edge = evidence.edge
    with np.errstate(invalid="ignore"):
        slack = np.abs(edge) * np.float32(1e-6)
        inside = (edge >= evidence.low - slack) & (edge <= evidence.high + slack)
    return np.where(inside, edge, np.float32("nan"))


def clamp(evidence: Evidence, base: Floats | None) -> Floats:
    """The public base, moved into the intervals."""
    assert base is not None
    return evidence.clamped(base)


Estimate = Callable[[Evidence, Floats | None], Floats]

FROM_ONE: dict[str, Estimate] = {"descale": first}
FROM_SEVERAL: dict[str, Estimate] = {
    "union": first,
    "average": average,
    "intersect": intersect,
    SCALE_READING: read_scales,
}
WITH_BASE: dict[str, Estimate] = {"clamp": clamp}


def estimates(proxies: int, base: bool) -> dict[str, Estimate]:
    """The attacks on shown elements that can be tried on so many proxies."""
    return (FROM_ONE if proxies == 1 else FROM_SEVERAL) | (WITH_BASE if base else {})


def fills(base: bool) -> tuple[str, ...]:
    """The attacks on hidden elements that can be tried."""
    return ("zero", "mean", "base") if base else ("zero", "mean")


def filled(fill: str, shown: Sums, hidden_truth: Sums, hidden_base: Sums | None) -> Sums:
    """Sums over hidden elements for one fill.

    Args:
        shown: of the attack on shown elements. hidden_truth: of hidden elements, count, w and w².
        hidden_base: of hidden elements with the public base as the guess; None: the tensor has none, zero is taken.
    """
    if fill == "base" and hidden_base is not None:
        return hidden_base
    mean = shown[G] / shown[COUNT] if shown[COUNT] else 0.0
    return constant_guess(hidden_truth, mean if fill == "mean" else 0.0)


def name_of(estimate: str, fill: str) -> str:
    """An attack's name in tables."""
    return estimate if fill == "zero" else f"{estimate}, {fill} fill"


def block_peaks(x: Floats, geometry: str, block: int) -> Floats:
    """For each value, the largest magnitude in its block: [rows, cols] of whole blocks, or their end."""
    rows, cols = x.shape
    size = np.abs(x)
    if geometry == "column":
        return _along_rows(np.ascontiguousarray(size.T), block).T
    if geometry == "row":
        return _along_rows(size, block)
    return _along_rows(size.reshape(1, -1), block).reshape(rows, cols)


def _along_rows(size: Floats, block: int) -> Floats:
    rows, cols = size.shape
    pad = -cols % block
    blocks: Any = np.pad(size, ((0, 0), (0, pad))).reshape(rows, -1, block)
    peaks: Floats = np.broadcast_to(blocks.max(axis=2, keepdims=True), blocks.shape).reshape(rows, cols + pad)[:, :cols]
    return peaks
