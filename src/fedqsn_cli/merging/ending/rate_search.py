"""`consolidate --lr auto`: the largest learning rate.

Short trainings are compared by how close they bring a student to its teachers on texts that are kept out of them, which
needs neither labels nor development data. Rates are tried in ascending order, until one brings the student less close
than the one before, or its training diverges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedqsn_cli.errors import Diverged
from fedqsn_cli.text import real

RATES = (5e-5, 2e-4, 8e-4, 3.2e-3)
"""From that of large models to that of models with a million weights and of adapters."""

SHARE = 4
"""A trial takes this part of the steps of the whole training."""


@dataclass(frozen=True, slots=True)
class RateTrial:
    """A short training with one learning rate.

    Args:
        divergence: the loss of the training on the texts that are kept out, in nats.
    """

    lr: float
    divergence: float


@dataclass(frozen=True, slots=True)
class RateSearch:
    """The learning rates that were tried, in ascending order, and the one that was taken."""

    chosen: float
    trials: tuple[RateTrial, ...]

    def rows(self, mark: str) -> list[tuple[str, ...]]:
        """All that was tried, for a table: rate, divergence, and a mark at what was taken."""
        return [(f"{one.lr:g}", real(one.divergence), mark * (one.lr == self.chosen)) for one in self.trials]


def search(divergence: Callable[[float], float]) -> RateSearch:
    """Try rates.

    Args:
        divergence: trains with a rate, and tells how far the student is from its teachers then.

    Raises:
        Diverged: the training with the smallest rate did.
    """
    trials = [RateTrial(RATES[0], divergence(RATES[0]))]
    for rate in RATES[1:]:
        try:
            trials.append(RateTrial(rate, divergence(rate)))
        except Diverged:
            break
        if trials[-1].divergence >= trials[-2].divergence:
            break
    return RateSearch(min(trials, key=lambda trial: trial.divergence).lr, tuple(trials))
