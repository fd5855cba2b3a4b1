"""Rules that decide how much each update counts as a whole, by its distances from the others.

    krum               the one whose n - f - 2 nearest others are nearest     Blanchard et al. 2017
    multi-krum         the n - f updates with the lowest such scores          (NeurIPS, arXiv 1703.02757)
    bulyan             n - 2 f updates, each by krum among those that are left   arXiv 1802.07927
    geometric-median   Weiszfeld's weights: 1 / distance from the median      RFA, arXiv 1912.13445

Distances D are of `distances`. Where all clients saw everything, they are squared Euclidean distances over the number
of weights, and a point z = Σ β_k Δ_k with Σ β_k = 1 is Σ_j β_j D_kj - ½ Σ_ij β_i β_j D_ij away from Δ_k, squared. So
the geometric median is found without reading the updates again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.options import MergeOptions

Doubles = NDArray[np.float64]

ITERATIONS = 1000
SMOOTHING = 1e-6
"""The least distance from the median, as a share of the typical one: a median that is an update has no weights."""
SETTLED = 1e-12


def krum_scores(distances: Doubles, byzantine: int) -> Doubles:
    """For each update the sum of its squared distances from the n - f - 2 nearest others, from one at least."""
    near = max(1, len(distances) - byzantine - 2)
    others = np.sort(distances + np.diag(np.full(len(distances), np.inf)), axis=1)
    scores: Doubles = others[:, :near].sum(axis=1)
    return scores


def krum(distances: Doubles, byzantine: int, count: int) -> Doubles:
    """Weight 1 for the `count` updates with the lowest scores; of equal ones the first."""
    weights = np.zeros(len(distances))
    weights[np.argsort(krum_scores(distances, byzantine), kind="stable")[:count]] = 1.0
    return weights


def bulyan(distances: Doubles, byzantine: int) -> Doubles:
    """Weight 1 for n - 2 f updates, chosen one after the other."""
    left, weights = list(range(len(distances))), np.zeros(len(distances))
    for _ in range(len(distances) - 2 * byzantine):
        best = left[int(np.argmin(krum_scores(distances[np.ix_(left, left)], byzantine)))] if len(left) > 1 else left[0]
        weights[best] = 1.0
        left.remove(best)
    return weights


def geometric_median(distances: Doubles) -> Doubles:
    """Weights β with the sum 1."""
    count = len(distances)
    weights = np.full(count, 1.0 / count)
    least = SMOOTHING * _typical(distances)
    if least == 0.0:  # all are equal
        return weights
    for _ in range(ITERATIONS):
        before, reach = weights, 1.0 / np.maximum(_from_point(distances, weights), least)
        weights = reach / _total(reach)
        if np.abs(weights - before).max() <= SETTLED:
            break
    return weights


def _typical(distances: Doubles) -> float:
    """Root of the median squared distance between updates that differ."""
    differing = distances[distances > 0]
    return math.sqrt(float(np.median(differing))) if differing.size else 0.0


def _from_point(distances: Doubles, weights: Doubles) -> Doubles:
    """The distance of each update from the point that the weights make."""
    within = np.array([_total(row * weights) for row in distances])
    squares = within - 0.5 * _total(within * weights)
    return np.asarray(np.sqrt(np.maximum(squares, 0.0)))


def _total(values: Sequence[float] | Doubles) -> float:
    """The sum, rounded once: the same on every machine."""
    return math.fsum(values)


RULES: dict[str, Callable[[Doubles, int], Doubles]] = {
    "krum": lambda distances, f: krum(distances, f, 1),
    "multi-krum": lambda distances, f: krum(distances, f, len(distances) - f),
    "geometric-median": lambda distances, f: geometric_median(distances),
    "bulyan": bulyan,
}
"""By name: what each update counts, of the distances between them and the number of attackers."""


def compares(options: MergeOptions) -> bool:
    """Whether the rule needs distances between whole updates."""
    return options.rule in RULES
