"""How near a reconstruction W' is to the weights W, from sums that are added up while both are read.

exact share   elements that are right to the last bit that the attacker has      / all elements
NMSE          ||W - W'||² / ||W||²
cosine        <W, W'> / (||W|| ||W'||)
delta         1 - ||W - W'||² / ||W - B||²        share of the weight difference to a public base B
direction     <W - B, W' - B>² / (||W - B||² ||W' - B||²)    what is left of it for who scales W' - B as is best
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.auditing.findings import LEAST_LOG10, AttackScore
from fedqsn_cli.auditing.kernels import compare

Floats = NDArray[np.float32]
Array = NDArray[Any]

EXACT = np.float32(2.0**-20)
"""Relative difference that scaling and scaling back leave of an exactly known fp32 number."""

COUNT, W, WW, G, GG, DD, HITS = range(7)


@dataclass(slots=True)
class ErrorSums:
    """ErrorSums over some elements: count, w, w², w', w'², (w - w')², exact ones."""

    values: NDArray[np.float64] = field(default_factory=lambda: np.zeros(7))

    def add(
        self, w: Floats, guess: Floats, row_flags: Array, flags: Floats, divisor: Any = 1, tolerance: Any = EXACT
    ) -> None:
        """Add rows; arguments are those of `kernels.compare`."""
        compare(w, guess, np.float32(divisor), row_flags, flags, np.float32(tolerance), self.values)

    def __getitem__(self, index: int) -> float:
        return float(self.values[index])

    def plus(self, other: ErrorSums) -> ErrorSums:
        """Both together."""
        return ErrorSums(self.values + other.values)

    def minus(self, part: ErrorSums) -> ErrorSums:
        """Without a part."""
        return ErrorSums(np.maximum(self.values - part.values, np.where([0, 1, 0, 1, 0, 0, 0], -np.inf, 0)))

    def scaled(self, factor: float) -> ErrorSums:
        """As if the guess had been `factor` times as large; what was exact is not any more."""
        n, w, ww, g, gg, dd, _ = self.values
        cross = (ww + gg - dd) / 2
        new = max(0.0, ww - 2 * factor * cross + factor * factor * gg)
        return ErrorSums(np.array([n, w, ww, factor * g, factor * factor * gg, new, 0.0]))


def constant_guess(truth: ErrorSums, value: float) -> ErrorSums:
    """ErrorSums for elements that are all guessed to be `value`; of `truth`, only count, w and w² are used."""
    n, w, ww = truth[COUNT], truth[W], truth[WW]
    error = max(0.0, ww - 2 * value * w + n * value * value)
    return ErrorSums(np.array([n, w, ww, n * value, n * value * value, error, 0.0]))


@dataclass(frozen=True, slots=True)
class AttackResult:
    """What one attack makes of some elements: those it was shown, and those it had to guess.

    Args:
        moved: ||W' - B||² of all of them; None where it was not added up.
    """

    shown: ErrorSums
    guessed: ErrorSums
    moved: float | None = None

    def plus(self, other: AttackResult) -> AttackResult:
        """Both together."""
        moved = None if self.moved is None or other.moved is None else self.moved + other.moved
        return AttackResult(self.shown.plus(other.shown), self.guessed.plus(other.guessed), moved)

    @property
    def error(self) -> float:
        """||W - W'||²."""
        return self.shown[DD] + self.guessed[DD]

    def score(self, attack: str, difference: float | None) -> AttackScore:
        """The measures.

        Args:
            difference: ||W - B||² over the same elements, None without a public base.
        """
        whole = self.shown.plus(self.guessed)
        return AttackScore(
            attack,
            whole[HITS] / whole[COUNT] if whole[COUNT] else 0.0,
            log10_ratio(whole[DD], whole[WW]),
            cosine(whole),
            None if not difference else 1 - whole[DD] / difference,
            log10_ratio(self.shown[DD], self.shown[WW]),
            self._direction(difference),
        )

    def _direction(self, difference: float | None) -> float | None:
        """Squared cosine between W - B and W' - B; 0 where they point away from each other."""
        if not difference or self.moved is None:
            return None
        product = (difference + self.moved - self.error) / 2
        return min(1.0, product * product / (difference * self.moved)) if product > 0 and self.moved > 0 else 0.0


def log10_ratio(error: float, energy: float) -> float:
    """log10(error / energy), LEAST_LOG10 where there is no error; 0 where nothing but error is there."""
    if math.isnan(error) or math.isnan(energy) or math.isinf(error) or math.isinf(energy):
        return math.nan
    if error <= 0:
        return LEAST_LOG10
    return max(LEAST_LOG10, math.log10(error / energy)) if energy > 0 else 0.0


def cosine(sums: ErrorSums) -> float:
    """Cosine between W and W'; 1 between zeros, 0 between zeros and anything else."""
    ww, gg = sums[WW], sums[GG]
    if ww <= 0 or gg <= 0:
        return 1.0 if ww == gg else 0.0
    return (ww + gg - sums[DD]) / 2 / math.sqrt(ww) / math.sqrt(gg)
