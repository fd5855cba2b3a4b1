"""Everything that an audit measured, and how one value is held against its limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedqsn_cli.artifacts.ledger import Release
from fedqsn_cli.auditing.completeness import NOT_A_NUMBER
from fedqsn_cli.auditing.findings import Entry, FunctionRecovery, Recovery
from fedqsn_cli.auditing.policy import Policy
from fedqsn_cli.auditing.registry import Rule
from fedqsn_cli.exposure.results import Exposure

TOLERANCE = 1e-9  # smaller differences count as none
LESS = "Hide more (a new job with a larger --p1), use a coarser format, release fewer proxies, or raise the limit."

PHRASES = {
    "exact_share": "share of all parameters recovered exactly",
    "log10_nmse": "log10 of the remaining normalised squared error",
    "cosine": "cosine between the weights and their reconstruction",
    "delta_recovered": "share of the weight difference to the public base recovered (not of skill)",
    "rho": "share of the model's function recovered",
    "gain": "share of the function that the proxies add to what public examples teach the base",
    "exposure": "share of all parameters seen",
    "clear_share": "share of all parameters in the clear",
}


@dataclass(frozen=True)
class Measured:
    """Everything that was measured; None for what was not.

    Args:
        releases: those of the job, in the order of the ledger.
        expected: exposure of one client after as many fresh proxies as the policy plans.
        baseline: measure -> value in an earlier audit, as `measures` gives them.
    """

    recovery: tuple[Recovery, ...] = ()
    function: FunctionRecovery | None = None
    exposure: Exposure | None = None
    expected: float | None = None
    releases: Sequence[Release] = ()
    baseline: Mapping[str, float] | None = None


@dataclass(frozen=True)
class LimitCheck:
    """A check of measurements, which `rules.py` finds in its module."""

    run: Callable[[Policy, Measured], Iterator[Entry]]


def check_limit(
    rule: Rule, scope: str, what: str, value: float, limit: float | None, tensor: str | None = None
) -> Iterator[Entry]:
    """Hold a value against a limit; a NaN is never within it. Single tensors are listed only when they fail.

    Args:
        what: the measure in words. limit: None where the policy sets none.
    """
    least = rule.id == "FQ202"  # an error: the less, the worse
    if not math.isfinite(value):
        message = f"{what} is not a finite number"
        yield NOT_A_NUMBER.finding(scope, message, tensor=tensor)
        yield rule.failed(scope, message)
    elif limit is None:
        yield from rule.checked(scope, f"{what}: {value:.4g}; the policy sets no limit")
    elif value < limit - TOLERANCE if least else value > limit + TOLERANCE:
        message = f"{what} is {value:.4g}, {'under' if least else 'over'} the limit of {limit:.4g}"
        yield rule.finding(scope, message, tensor=tensor, value=value, limit=limit)
        yield rule.failed(scope, message if tensor is None else f"{tensor}: {message}")
    elif tensor is None:
        yield from rule.checked(scope, f"{what}: {value:.4g}; limit {limit:.4g}")
