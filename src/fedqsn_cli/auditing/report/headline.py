"""What an attacker can do with the proxies: the first thing that every format says. Weights come after it.

A share of recovered weights says nothing about skill: most of a difference may be rounding that the model's function
does not depend on. So where the function was not measured, every format says that first.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedqsn_cli.auditing.findings import Audit, CurvePoint, FunctionRecovery, ModelScore
from fedqsn_cli.text import percent, real

NOT_MEASURED = "Function was not measured: this verdict says nothing about the model's skill."
NO_EXAMPLES = "What an attacker learns from public examples was not measured (--public-data)."
NO_BASE = (
    "No public base was given: if the model was fine-tuned from a public one, attackers can do more than is said here "
    "(--public-base)."
)
NO_LIMIT = "No limit was set for the skill that an attacker gets (rho)."
PROXY_ALONE = (
    "whether hidden weights or the key are in it, whether its masks follow from the key, what an attacker recovers, "
    "and what clients have seen: that needs the owner's --truth, --key and --ledger. Its own files were compared, "
    "no more."
)

Line = tuple[str, str]
"""What it is, and how much."""


def headline(audit: Audit) -> list[Line]:
    """What an attacker can do, line by line; empty for an audit without proxies."""
    if not _has_proxies(audit):
        return []
    of_owner = {"job", "ledger", "truth (names and shapes)"} & audit.inputs.keys()
    alone = [] if of_owner else [("cannot be known", PROXY_ALONE)]
    found = audit.function
    if found is None or found.rho is None:
        return [*alone, ("skill", NOT_MEASURED)]
    scores = {score.model: score for score in found.scores}
    lines = [("skill without examples", _without_examples(found, scores.get("attacked")))]
    lines += [
        (f"skill with {point.public_examples} public examples", _with_examples(point, found.left_out))
        for point in found.curve
    ]
    if not found.curve and not found.left_out:
        lines.append(("skill with public examples", "not measured (needs --public-data)"))
    if found.left_out:
        lines.append(("not tried, for lack of time", f"{len(found.left_out)} attacks (--attack-minutes)"))
    compared = [
        (name, scores[model])
        for name, model in (("the owner's model", "global"), ("the public base", "base"))
        if model in scores
    ]
    return [*alone, *lines, *((f"beside it: {name}", _score(score)) for name, score in compared)]


def doubts(audit: Audit) -> list[str]:
    """What an audit leaves open about skill, in sentences; where there are any, nothing may look like a plain pass."""
    if not _has_proxies(audit):
        return []
    if audit.function is None or audit.function.rho is None:
        return [NOT_MEASURED]
    limits, threat = audit.policy.get("limits", {}), audit.policy.get("threat", {})
    limited = any(limits.get(scope, {}).get("rho") is not None for scope in ("proxy", "coalition"))
    with_base = any(found.best.delta_recovered is not None for found in audit.recovery)
    open_questions = {
        NO_EXAMPLES: not audit.function.curve,
        NO_BASE: not with_base and threat.get("public_base") is not False,
        NO_LIMIT: not limited,
    }
    return [sentence for sentence, applies in open_questions.items() if applies]


def _has_proxies(audit: Audit) -> bool:
    return any(check.rule.startswith("FQ3") or check.scope.startswith("proxy ") for check in audit.checked)


def _without_examples(found: FunctionRecovery, score: ModelScore | None) -> str:
    rho = found.rho or 0.0
    attained = f"; {_score(score)}" if score is not None else ""
    return f"{percent(max(rho, 0.0))} of the way from {found.floor} to the owner's model (rho {rho:.3f}){attained}"


def _with_examples(point: CurvePoint, left_out: Sequence[str]) -> str:
    rho = "rho not defined" if point.rho is None else f"rho {point.rho:.3f}"
    gain = ""
    if point.gain is not None:
        gain = f", of which the proxies add {percent(max(point.gain, 0.0))} over the base"
    elif any(name.startswith("base, ") for name in left_out):
        gain = ", of which the base alone may give any share (not tried, for lack of time)"
    accuracy = "" if point.accuracy is None else f", accuracy {real(point.accuracy)}"
    attack = "" if point.attack is None else f" ({point.attack})"
    return f"{rho}{gain}; loss {real(point.loss)}{accuracy}{attack}"


def _score(score: ModelScore) -> str:
    return f"loss {real(score.loss)}" + ("" if score.accuracy is None else f", accuracy {real(score.accuracy)}")
