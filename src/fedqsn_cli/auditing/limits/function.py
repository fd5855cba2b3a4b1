"""FQ301 and FQ302: how well the best attacked proxy works, as it is and after fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator

from fedqsn_cli.auditing.findings import Entry, Finding, FunctionRecovery
from fedqsn_cli.auditing.inputs import EVAL_DATA, KEY, PROXY, PUBLIC_DATA, TRUTH
from fedqsn_cli.auditing.limits.measured import LESS, PHRASES, LimitCheck, Measured, check_limit
from fedqsn_cli.auditing.policy import Limits, Policy
from fedqsn_cli.auditing.registry import Rule

FUNCTION_RECOVERY = Rule(
    "FQ301",
    "function-recovery",
    "gate",
    what="rho: how far the best attacked proxy gets from the floor to the global model, in loss.",
    why="A client must be able to train, so a proxy works; it must not work as well as the model.",
    fix=LESS,
    scope="function",
    needs=(PROXY, TRUTH, KEY, EVAL_DATA),
    limited=lambda policy: any(limits.rho is not None for limits in (policy.limits.proxy, policy.limits.coalition)),
)
FUNCTION_AFTER_TUNING = Rule(
    "FQ302",
    "function-after-tuning",
    "gate",
    what="rho after the attacker has fine-tuned the proxy with public examples.",
    why="Masked models can be healed with data.",
    fix=LESS,
    scope="function",
    needs=(PROXY, TRUTH, KEY, EVAL_DATA, PUBLIC_DATA),
    limited=lambda policy: any(limits.gain is not None for limits in (policy.limits.proxy, policy.limits.coalition)),
)


@LimitCheck
def function(policy: Policy, measured: Measured) -> Iterator[Entry]:
    """rho as it is; after fine-tuning rho, and its gain over the fine-tuned base if that has a limit."""
    found = measured.function
    if found is None:
        return
    limits = policy.limits.of_function
    if found.rho is None:
        why = "rho is not defined: the global model is no better than the floor"
        yield from (rule.not_run(found.scope, why) for rule in (FUNCTION_RECOVERY, FUNCTION_AFTER_TUNING))
    else:
        yield from check_limit(FUNCTION_RECOVERY, found.scope, PHRASES["rho"], found.rho, limits.rho)
    yield from _after_tuning(limits, found)


def _after_tuning(limits: Limits, found: FunctionRecovery) -> Iterator[Entry]:
    rule, scope = FUNCTION_AFTER_TUNING, found.scope
    tuned = [(point.rho, point.public_examples) for point in found.curve if point.rho is not None]
    gains = [(point.gain, point.public_examples) for point in found.curve if point.gain is not None]
    entries: list[Entry] = []
    if not found.curve and found.left_out:
        entries.append(rule.not_run(scope, "no attack was trained within --attack-minutes"))
    if tuned:
        best, examples = max(tuned, key=lambda pair: pair[0])
        what = f"{PHRASES['rho']} after {examples} public examples"
        entries += check_limit(rule, scope, what, best, limits.rho)
    if gains and limits.gain is not None:
        most, examples = max(gains)
        entries += check_limit(rule, scope, f"{PHRASES['gain']}, {examples} of them", most, limits.gain)
    elif limits.gain is not None:  # rho alone is not what was asked, so its check does not count
        entries = [entry for entry in entries if isinstance(entry, Finding)]
        needed = "--public-base, with all tensors of the model, and --public-data"
        if any(name.startswith("base, ") for name in found.left_out):
            needed = "the base trained with the same examples, which --attack-minutes left out"
        why = f"the gain over the base needs {needed}"
        entries.append(rule.not_run(scope, why))
    yield from entries
