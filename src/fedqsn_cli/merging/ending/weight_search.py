"""`consolidate --transfer-weight auto`: how much the clients' teacher counts.

A student is trained with each weight. Of those that keep the owner's skill, the one is taken that learnt most of what
clients teach. Both are losses on development data of the owner's: on examples of their own skill, and on examples of
what clients teach.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedqsn_cli.errors import GateFailed
from fedqsn_cli.text import real
from fedqsn_cli.training.scoring.scoring import Evaluation

WEIGHTS = (0.25, 0.5, 0.75, 1.0, 1.5)
USUAL_WEIGHT = 0.75
"""What learning rates are compared with, before weights are."""


@dataclass(frozen=True, slots=True)
class WeightTrial:
    """The student of one weight, measured on the owner's skill and on what clients teach."""

    weight: float
    own: Evaluation
    clients: Evaluation


@dataclass(frozen=True, slots=True)
class WeightSearch:
    """The weights that were tried, and the one that was taken.

    Args:
        own_before, clients_before: the global model on the same data.
        tolerance: how much more loss than the global model a student may have on the owner's skill, in nats.
        trials: by weight, in ascending order.
    """

    chosen: float
    own_before: Evaluation
    clients_before: Evaluation
    tolerance: float
    trials: tuple[WeightTrial, ...]

    def rows(self, mark: str) -> list[tuple[str, ...]]:
        """All that was tried, for a table: weight, both losses, and a mark at what was taken."""
        return [
            (f"{trial.weight:g}", real(trial.own.loss), real(trial.clients.loss), mark * (trial.weight == self.chosen))
            for trial in self.trials
        ]


def rank(trial: WeightTrial, own_limit: float) -> tuple[bool, float, float]:
    """What the best of all trials has the least of: those that lose too much come last, the least loss of skill first.

    Args:
        own_limit: the most loss that a student may have on the owner's skill.
    """
    lost = trial.own.loss > own_limit
    return lost, trial.own.loss if lost else trial.clients.loss, trial.weight


def require_better(best: WeightTrial, own_before: Evaluation, clients_before: Evaluation, tolerance: float) -> None:
    """Refuse to write a model that lost too much of the owner's skill, or learnt nothing. Raises GateFailed."""
    where = "--transfer-weight auto"
    if best.own.loss > own_before.loss + tolerance:
        raise GateFailed(
            f"every weight loses more than {tolerance:g} on the owner's skill: its loss is {own_before.loss:.6g} now, "
            f"and {best.own.loss:.6g} with the best weight, {best.weight:g}",
            where=where,
            hint="give more --own-data or --steps, or a larger --own-tolerance",
        )
    if best.clients.loss > clients_before.loss:
        raise GateFailed(
            f"no weight makes the model better at what clients teach: its loss is {clients_before.loss:.6g} now, and "
            f"{best.clients.loss:.6g} with the best weight, {best.weight:g}",
            where=where,
            hint="the server model may know less of it than the global one: compare them with 'fedqsn evaluate'",
        )
