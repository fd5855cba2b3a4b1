"""What several formats say in the same words."""

from __future__ import annotations

from collections.abc import Sequence

from fedqsn_cli.auditing.findings import Audit, Check, Finding, Recovery, Severity
from fedqsn_cli.auditing.report.headline import NOT_MEASURED, doubts
from fedqsn_cli.auditing.rules import RULES
from fedqsn_cli.exposure.results import Exposure
from fedqsn_cli.text import percent

WHAT_IT_MEANS = {
    "broken": "A hard invariant is broken. Do not send these proxies.",
    "incomplete": "Something that must be checked could not be. This is not a pass.",
    "over the limits": "More leaks than the policy allows.",
    "passed": "Everything that was checked is within the limits.",
}
LOWER_BOUND = "What the attacks recover is a lower bound on the leakage: better attacks may exist."
NOT_SKILL = (
    "The weight difference is the share of ||W - B||² to the public base B that is recovered, rounding included; its "
    "direction is the squared cosine between W' - B and W - B, the share that is left after the best scaling. Neither "
    "says anything about skill: a model that recovers little of them can do all that the owner's model does."
)
SEVERITIES: dict[Severity, str] = {"hard": "hard", "gate": "limit", "incomplete": "incomplete", "info": "note"}
ORDER: dict[Severity, int] = {"hard": 0, "incomplete": 1, "gate": 2, "info": 3}


def title(audit: Audit) -> str:
    """The verdict in a few words: a pass that leaves skill open is not called just that."""
    return "passed, but not for skill" if audit.verdict == "passed" and doubts(audit) else audit.verdict


def verdict(audit: Audit) -> str:
    """`passed (exit code 0)`."""
    return f"{title(audit)} (exit code {audit.exit_code})"


def meaning(audit: Audit) -> str:
    """The verdict in a sentence or two; a pass says what was not limited, and what it leaves open about skill.

    That the function was not measured is said by the headline, whatever the verdict.
    """
    if audit.verdict == "passed" and audit.policy.get("sha256") is None:
        said = "Nothing forbidden was found. No policy was given, so nothing was compared with a limit."
    else:
        said = WHAT_IT_MEANS[audit.verdict]
    left_open = doubts(audit) if audit.verdict == "passed" else []
    return " ".join([said, *(one for one in left_open if one != NOT_MEASURED)])


def ordered(audit: Audit) -> list[Finding]:
    """Findings, the worst kind first."""
    return sorted(audit.findings, key=lambda finding: ORDER[finding.severity])


def unchecked(audit: Audit) -> list[Check]:
    """Rules that could not be applied, most often because an input was not given; in the order of their ids."""
    return sorted((check for check in audit.checked if check.status == "not-run"), key=lambda check: check.rule)


def worst_recovery(audit: Audit) -> Recovery | None:
    """The recovery with the least error: what all proxies together give away, most often."""
    return min(audit.recovery, key=lambda recovery: recovery.peak.log10_nmse, default=None)


def rule_name(rule: str) -> str:
    """`FQ101 client-exposure`."""
    return f"{rule} {RULES[rule].name}"


def about(finding: Finding) -> str:
    """`proxy alice, encoder.weight`."""
    return finding.scope if finding.tensor is None else f"{finding.scope}, {finding.tensor}"


def nearly_all_seen(exposure: Exposure) -> str | None:
    """When 99 % of all that is ever sent is seen: `after 3 fresh proxies`; None where nothing masked is sent."""
    if exposure.hidden_share + exposure.clear_share > 1 - 1e-9:
        return None
    count = exposure.proxies_to_99
    return f"after {'no number of' if count is None else count} fresh {'proxy' if count == 1 else 'proxies'}"


def members(names: Sequence[str], most: int = 5) -> str:
    """Names of a coalition, not all of a large one."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def delta(value: float | None) -> str:
    """A recovered difference; a dash where there is no public base."""
    return "-" if value is None else percent(value) if value >= 0 else "none"


def squared(log10: float) -> str:
    """An error whose logarithm is given: `8.4e-03`."""
    return f"{10**log10:.1e}"
