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
from fedqsn_cli.auditing.stored_rows import StoredRows

Floats = NDArray[np.float32]
Array = NDArray[Any]
Flags = tuple[Array, Floats]
"""Row flags and flags of elements, as `kernels.compare` takes them."""

EXACT = np.float32(2.0**-20)
"""Relative difference that scaling and scaling back leave of an exactly known fp32 number."""

COUNT, W, WW, G, GG, DD, HITS, MOVED = range(8)
_LEAST = np.where([name in (W, G) for name in range(8)], -np.inf, 0)


@dataclass(slots=True)
class ErrorSums:
    """Sums over some elements: count, w, w², w', w'², (w - w')², exact ones, (w' - b)²; b is 0 without a base."""

    values: NDArray[np.float64] = field(default_factory=lambda: np.zeros(8))

    def add(
        self,
        w: StoredRows,
        guess: StoredRows,
        shown: Flags,
        *,
        certain: Floats | None = None,
        base: Floats | None = None,
        divisor: Any = 1,
        tolerance: float = float(EXACT),
    ) -> None:
        """Add rows.

        Args:
            shown: which elements, as row_flags and flags of `kernels.compare`; the others are its arguments, too.
            certain: what the attacker is certain of, where that is not the guess.
        """
        nothing = np.empty((0, shown[1].shape[1]), np.float32)
        certain, base = nothing if certain is None else certain, nothing if base is None else base
        bits, kind, *_ = w.numbers
        compared = certain, base, *shown, np.float32(tolerance)
        compare(bits, kind, *guess.numbers, np.float32(divisor), *compared, self.values)

    def __getitem__(self, index: int) -> float:
        return float(self.values[index])

    def __add__(self, other: ErrorSums) -> ErrorSums:
        return ErrorSums(self.values + other.values)

    def minus(self, part: ErrorSums) -> ErrorSums:
        """Without a part."""
        return ErrorSums(np.maximum(self.values - part.values, _LEAST))

    def scaled(self, factor: float) -> ErrorSums:
        """As if the guess had been `factor` times as large; what was exact is not any more."""
        n, w, ww, g, gg, dd, *_ = self.values
        cross = (ww + gg - dd) / 2
        new = max(0.0, ww - 2 * factor * cross + factor * factor * gg)
        return ErrorSums(np.array([n, w, ww, factor * g, factor * factor * gg, new, 0.0, math.nan]))


def constant_guess(truth: ErrorSums, value: float, base: ErrorSums | None) -> ErrorSums:
    """Sums for elements that are all guessed to be `value`.

    Args:
        truth: over the same elements, of which only count, w and w² are used. base: with the public base as the guess.
    """
    n, w, ww = truth[COUNT], truth[W], truth[WW]
    error, energy = max(0.0, ww - 2 * value * w + n * value * value), n * value * value
    moved = energy if base is None else base[GG] - 2 * value * base[G] + base[COUNT] * value * value
    return ErrorSums(np.array([n, w, ww, n * value, energy, error, 0.0, moved]))


@dataclass(frozen=True, slots=True)
class AttackResult:
    """What one attack makes of some elements: those it was shown, and those it had to guess."""

    shown: ErrorSums
    guessed: ErrorSums

    def __add__(self, other: AttackResult) -> AttackResult:
        return AttackResult(self.shown + other.shown, self.guessed + other.guessed)

    @property
    def whole(self) -> ErrorSums:
        """Both together."""
        return self.shown + self.guessed

    def score(self, attack: str, difference: float | None) -> AttackScore:
        """The measures.

        Args:
            difference: ||W - B||² over the same elements, None without a public base.
        """
        whole = self.whole
        return AttackScore(
            attack,
            whole[HITS] / whole[COUNT] if whole[COUNT] else 0.0,
            log10_ratio(whole[DD], whole[WW]),
            cosine(whole),
            1 - whole[DD] / difference if difference else None,
            log10_ratio(self.shown[DD], self.shown[WW]),
            direction(whole, difference) if difference else None,
        )


def direction(sums: ErrorSums, difference: float) -> float | None:
    """Squared cosine between W - B and W' - B, 0 where they point away from each other; None if it was not added up."""
    if math.isnan(sums[MOVED]):
        return None
    product = (difference + sums[MOVED] - sums[DD]) / 2
    return min(1.0, product * product / (difference * sums[MOVED])) if product > 0 and sums[MOVED] > 0 else 0.0


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
