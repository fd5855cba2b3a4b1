"""Clipping of an update as a whole, and Gaussian noise on it: the client's data set is hidden as a whole.

    Δ  = U / s                                        model coordinates, over everything that was trained
    Δ' = Δ · min(1, C / ‖Δ‖₂)                         --clip-norm C
    Δ" = Δ' + N(0, (z C)²) for each number            --noise-multiplier z
    U" = s Δ"

Whatever two data sets a client may have, their Δ' are at most 2 C apart. So Δ" is (ε, δ)-differentially private in the
local model, for one round, with δ(ε) of the Gaussian mechanism at sensitivity / deviation = 2 / z (`gaussian_delta`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedqsn_cli.training.steps.secure_random import normals


@dataclass(frozen=True, slots=True)
class UpdateNoise:
    """What is done to the U of every tensor that was trained.

    Args:
        factor: min(1, C / ‖Δ‖₂). deviation: z C, 0 without noise.
        scales: s by tensor name, where it is not 1.
    """

    factor: float
    deviation: float
    scales: Mapping[str, float]

    @classmethod
    def of(
        cls, updates: Iterable[tuple[str, Tensor]], scales: Mapping[str, float], clip_norm: float, multiplier: float
    ) -> UpdateNoise:
        """Measure ‖Δ‖₂ of all trained tensors, `updates`, by their names."""
        squares = 0.0
        for name, update in updates:
            squares += float(torch.linalg.vector_norm(update, dtype=torch.float64)) ** 2 / scales.get(name, 1.0) ** 2
        norm = math.sqrt(squares)
        return cls(min(1.0, clip_norm / norm) if norm else 1.0, multiplier * clip_norm, scales)

    def apply(self, name: str, update: Tensor) -> Tensor:
        """U" of one tensor."""
        clipped = update * self.factor
        if not self.deviation:
            return clipped
        noise = torch.from_numpy(normals(update.numel())).reshape(update.shape)
        return clipped + noise * (self.deviation * self.scales.get(name, 1.0))


def gaussian_delta(epsilon: float, multiplier: float) -> float:
    """δ of the Gaussian mechanism for an update: Balle and Wang 2018 (arXiv 1805.06530), theorem 8.

    δ(ε) = Φ(r/2 − ε/r) − e^ε Φ(−r/2 − ε/r), r = 2 / z.
    """
    from scipy.special import log_ndtr, ndtr

    ratio = 2.0 / multiplier
    second = math.exp(epsilon + float(log_ndtr(-ratio / 2 - epsilon / ratio)))
    return max(0.0, float(ndtr(ratio / 2 - epsilon / ratio)) - second)


def gaussian_epsilon(delta: float, multiplier: float) -> float:
    """The smallest ε at which one noisy update is (ε, δ)-differentially private, to six digits, rounded up."""
    low, high = 0.0, 1.0
    while gaussian_delta(high, multiplier) > delta:
        low, high = high, 2 * high
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(middle, multiplier) > delta else (low, middle)
    return high
