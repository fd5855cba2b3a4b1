"""`consolidate --lr auto`: the largest learning rate.

Students are compared by how close they come to their teachers on texts that are kept out of the training, which needs
neither labels nor development data. Rates are tried in ascending order, until one brings the student less close than
the one before, or its training diverges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from fedqsn_cli.errors import Diverged
from fedqsn_cli.text import real

RATES = (5e-5, 2e-4, 8e-4, 3.2e-3)
"""From that of large models to that of models with a million weights and of adapters."""


@dataclass(frozen=True, slots=True)
class RateTrial:
    """The student of one learning rate.

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


class _Tried(Protocol):
    """A student that was trained, and how far it is from its teachers on the texts that are kept out."""

    @property
    def divergence(self) -> float: ...


TriedT = TypeVar("TriedT", bound=_Tried)


def search(attempt: Callable[[float], TriedT]) -> tuple[TriedT, RateSearch]:
    """The best student, and what was tried. Two students are in memory at a time.

    Args:
        attempt: trains a student with a learning rate.
    """
    best, trials = attempt(RATES[0]), []
    trials.append(RateTrial(RATES[0], best.divergence))
    for rate in RATES[1:]:
        try:
            one = attempt(rate)
        except Diverged:
            break
        trials.append(RateTrial(rate, one.divergence))
        if not one.divergence < best.divergence:
            break
        best = one
    chosen = min(trials, key=lambda trial: trial.divergence).lr
    return best, RateSearch(chosen, tuple(trials))
