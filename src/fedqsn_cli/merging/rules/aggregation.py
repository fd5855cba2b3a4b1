"""How the updates of a round are put together: what each of them counts, and by which rule."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fedqsn_cli.errors import InputError
from fedqsn_cli.merging.rules import client_weights
from fedqsn_cli.merging.rules.order_rules import KINDS, OrderRule
from fedqsn_cli.merging.rules.survey import Survey
from fedqsn_cli.merging.step.noise import Noise
from fedqsn_cli.merging.updates.read_update import ClientUpdate
from fedqsn_cli.merging.updates.verify import Round
from fedqsn_cli.options import MergeOptions
from fedqsn_cli.text import percent

LEAST_WEIGHT = 2.0**-20
"""What an update that is late counts at least."""

_LEAST: dict[str, tuple[int, int]] = {"krum": (2, 3), "multi-krum": (2, 3), "bulyan": (4, 3)}
"""a and b: the rule is proven for a f + b updates or more. The others need 2 f + 1."""


@dataclass(frozen=True, slots=True)
class Aggregation:
    """How the updates of a round are put together.

    Args:
        weights: what each update counts in an average; 0 leaves it out. factors: what each Δ_k is multiplied by.
        divisor: what each unit's sum is divided by; None for the weights of the clients that saw it.
        order: the rule that puts values in order; None for an average.
        least: how many clients must have seen a unit that is averaged.
        noise: what is added to each sum; None for none.
        others: what all updates in partial sums count together. late: how many rounds late each update is.
        merged: the ids of the proxies whose updates count.
    """

    weights: tuple[float, ...]
    factors: tuple[float, ...]
    divisor: float | None
    order: OrderRule | None
    least: int
    control_weight: float
    noise: Noise | None
    others: float
    late: tuple[int, ...]
    merged: tuple[str, ...]

    @property
    def whole(self) -> float:
        """What all updates count together."""
        return sum(self.weights) + self.others

    def share(self, number: int) -> float:
        """What an update counts, as a share of all."""
        return self.weights[number] / self.whole

    def verdict(self, number: int) -> str:
        """What happened to an update, in a word or two."""
        if self.weights[number] == 0:
            return "left out"
        late = self.late[number]
        return clipped(self.factors[number]) + (f", {late} round{'s' * (late > 1)} late" if late else "")


def clipped(factor: float) -> str:
    """What happened to an update that was merged `factor` times."""
    return "merged" if factor == 1 else f"clipped to {percent(factor)}"


def aggregation(options: MergeOptions, found: Round, survey: Survey | None, noise: Noise | None) -> Aggregation:
    """Decide what each update counts.

    Args:
        survey: what a first pass found; needed to clip, and by rules that compare whole updates.

    Raises:
        InputError: there are too few updates for the rule. RefusedUpdate: two of them cannot be compared.
    """
    updates, others = found.updates, float(sum(each.examples for each in found.partials))
    _require_enough(options, len(updates))
    factors = clip_factors(survey.norms, options.clip_norm) if survey and options.clip_norm else [1.0] * len(updates)
    by_examples, f = options.rule == "fedavg" and noise is None, options.byzantine or 0
    weights = [_examples(update, options.staleness_discount) if by_examples else 1.0 for update in updates]
    if survey is not None and client_weights.compares(options):
        weights = client_weights.RULES[options.rule](survey.distances(factors), f).tolist()
    return Aggregation(
        weights=tuple(weights),
        factors=tuple(factors),
        divisor=sum(weights) + others if options.normalize == "clients" else None,
        order=OrderRule(options.rule, f) if options.rule in KINDS else None,
        least=2 * f + 1 if options.rule == "geometric-median" else 1,
        control_weight=options.control_weight,
        noise=noise,
        others=others,
        late=tuple(update.late for update in updates),
        merged=(
            *(update.release.proxy_id for update, weight in zip(updates, weights, strict=True) if weight),
            *(release.proxy_id for partial in found.partials for release in partial.releases),
        ),
    )


def _examples(update: ClientUpdate, discount: float | None) -> float:
    """n_k, times (1 + r)^-a of an update that is r rounds late (Xie et al. 2019, arXiv 1903.03934, polynomial).

    It is rounded to a multiple of `LEAST_WEIGHT`, so that sums of such numbers do not depend on their order.
    """
    if not update.late or discount is None:
        return float(update.examples)
    counted: float = update.examples * (1.0 + update.late) ** -discount
    return max(1, round(counted / LEAST_WEIGHT)) * LEAST_WEIGHT


def clip_factors(norms: Sequence[float], limit: float | str) -> list[float]:
    """What Δ_k is multiplied by so that its norm is `limit` at most; auto is the median of the norms."""
    most = statistics.median(norms) if isinstance(limit, str) else limit
    return [min(1.0, most / norm) if norm > 0 else 1.0 for norm in norms]


def _require_enough(options: MergeOptions, count: int) -> None:
    if options.byzantine is None:
        return
    times, more = _LEAST.get(options.rule, (2, 1))
    least = times * options.byzantine + more
    if count < least:
        raise InputError(
            f"{options.rule} needs {least} updates or more to withstand {options.byzantine}; this merge has {count}",
            where="--byzantine",
            hint="give a smaller number, or more updates",
        )
