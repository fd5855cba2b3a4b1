"""FQ201 to FQ204: what the best attack recovers of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fedqsn_cli.auditing.findings import Entry, Recovery, TensorRecovery
from fedqsn_cli.auditing.inputs import BASE, KEY, PROXY, TRUTH
from fedqsn_cli.auditing.limits.measured import LESS, PHRASES, LimitCheck, Measured, check_limit
from fedqsn_cli.auditing.policy import Policy, WeightLimits
from fedqsn_cli.auditing.registry import Rule


def _limited(measure: str) -> Callable[[Policy], bool]:
    return lambda policy: policy.limits.any_on(measure)


EXACT_RECOVERY = Rule(
    "FQ201",
    "exact-recovery",
    "gate",
    what="Share of all parameters that an attacker holds exactly.",
    why="Exact weights are the model itself.",
    fix=LESS,
    scope="recovery",
    needs=(PROXY, TRUTH, KEY),
    limited=_limited("exact_share"),
)
RECOVERY_ERROR = Rule(
    "FQ202",
    "recovery-error",
    "gate",
    what="Normalised squared error of the best reconstruction, over all parameters.",
    why="The smaller it is, the nearer the attacker's copy.",
    fix=LESS,
    scope="recovery",
    needs=(PROXY, TRUTH, KEY),
    limited=_limited("log10_nmse"),
)
RECOVERY_COSINE = Rule(
    "FQ203",
    "recovery-cosine",
    "gate",
    what="Cosine between the weights and their best reconstruction.",
    why="The nearer to 1, the nearer the attacker's copy.",
    fix=LESS,
    scope="recovery",
    needs=(PROXY, TRUTH, KEY),
    limited=_limited("cosine"),
)
DIFFERENCE_RECOVERED = Rule(
    "FQ204",
    "difference-recovered",
    "gate",
    what="Share of the squared weight difference to the public base that the best attack recovers; not of skill.",
    why="Of a fine-tuned model the difference is the secret; everything else is public. A model that recovers little "
    "of it can still have all of the skill: FQ301 and FQ302 measure that.",
    fix=LESS,
    needs=(PROXY, TRUTH, KEY, BASE),
    limited=_limited("delta_recovered"),
)

MEASURES = {
    "exact_share": EXACT_RECOVERY,
    "log10_nmse": RECOVERY_ERROR,
    "cosine": RECOVERY_COSINE,
    "delta_recovered": DIFFERENCE_RECOVERED,
}
WITHOUT_UNITS = frozenset({"norm", "bias", "buffer"})  # roles that no limit for single tensors is meant for


@LimitCheck
def recovery(policy: Policy, measured: Measured) -> Iterator[Entry]:
    """Every proxy and coalition, and where the policy limits single tensors, each of them."""
    for found in measured.recovery:
        yield from _whole(policy, found)
        if policy.limits.tensor != WeightLimits():
            for tensor in found.tensors:
                if tensor.role not in WITHOUT_UNITS:
                    yield from _tensor(policy.limits.tensor, found.scope, tensor)


def _whole(policy: Policy, found: Recovery) -> Iterator[Entry]:
    limits, peak = policy.limits.of(found.scope), found.peak
    for measure, rule in MEASURES.items():
        value, limit = getattr(peak, measure), getattr(limits, measure)
        if value is not None:
            yield from check_limit(rule, found.scope, PHRASES[measure], value, limit)
        elif limit is not None:
            yield rule.lacks(found.scope, BASE)


def _tensor(limits: WeightLimits, scope: str, tensor: TensorRecovery) -> Iterator[Entry]:
    for measure, rule in MEASURES.items():
        value, limit = getattr(tensor, measure), getattr(limits, measure)
        if value is not None and limit is not None:
            what = PHRASES[measure].replace("all parameters", "its parameters")
            yield from check_limit(rule, scope, what, value, limit, tensor.tensor)
