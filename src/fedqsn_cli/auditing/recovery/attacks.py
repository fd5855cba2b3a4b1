"""Attacks on weights, as tables: what an attacker makes of the elements they were shown, and of those they were not.

    shown       as sent      the proxy's values as they are
                descale      divided by n / |V|, which the shape of the mask gives away
                union        of several proxies the first that shows an element
                average      the mean over all proxies that show it: undoes rounding that differs between them
                intersect    every rounded value says in which interval the weight is; the middle of what is left
    scale reading  as intersect, but an element whose level is 1 attains the scale of its block: it is the scale. Where
                 several share that level, one of them is, and the others are in their intervals
                clamp        the public base, moved into that interval
                low-rank     base + the leading singular directions of the visible difference, moved into the interval
    hidden      zero, mean (of the tensor's shown elements), base (the same element of the public base), and, where
                clients have trained the holes, what is in them

The element that attains a block's scale is known exactly ("scale reading"): its level is 1, so descaling shows it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.auditing.kernels import share_edges
from fedqsn_cli.auditing.recovery.evidence import Evidence
from fedqsn_cli.auditing.recovery.metrics import COUNT, ErrorSums, G, constant_guess

Floats = NDArray[np.float32]

AS_SENT, LOW_RANK, SCALE_READING, HOLES = "as sent", "low-rank", "scale reading", "descale, holes as sent"


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
    """The public base, moved into the intervals; what was shown where the base has no such tensor."""
    return evidence.first if base is None else evidence.clamped(base)


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


def filled(fill: str, shown: ErrorSums, hidden_truth: ErrorSums, hidden_base: ErrorSums | None) -> ErrorSums:
    """ErrorSums over hidden elements for one fill.

    Args:
        shown: of the attack on shown elements. hidden_truth: of hidden elements, count, w and w².
        hidden_base: of hidden elements with the public base as the guess; None: the tensor has none, zero is taken.
    """
    if fill == "base" and hidden_base is not None:
        return hidden_base
    mean = shown[G] / shown[COUNT] if shown[COUNT] else 0.0
    return constant_guess(hidden_truth, mean if fill == "mean" else 0.0, hidden_base)


def name_of(estimate: str, fill: str) -> str:
    """An attack's name in tables."""
    return estimate if fill == "zero" else f"{estimate}, {fill} fill"
