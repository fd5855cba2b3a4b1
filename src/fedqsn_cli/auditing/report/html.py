"""One page for people who decide: verdict, what was seen, what can be recovered. Self-contained, no script.

What the page says is in report.html.j2; here are the values that it shows.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from fedqsn_cli.auditing.findings import AttackScore, Audit
from fedqsn_cli.auditing.report.headline import headline
from fedqsn_cli.auditing.report.html_plots import plots
from fedqsn_cli.auditing.report.sections import MEASURES, attempts, cells
from fedqsn_cli.auditing.report.wording import (
    LOWER_BOUND,
    NOT_SKILL,
    SEVERITIES,
    about,
    delta,
    meaning,
    nearly_all_seen,
    ordered,
    rule_name,
    title,
    unchecked,
    worst_recovery,
)
from fedqsn_cli.auditing.rules import RULES
from fedqsn_cli.exposure.results import Exposure
from fedqsn_cli.html import pages
from fedqsn_cli.text import percent

TEMPLATE = Path(__file__).parent / "report.html.j2"
MOST_FINDINGS = 50

VERDICTS = {
    "passed": {"title": "Passed", "css": "passed"},
    "over the limits": {"title": "Over the limits", "css": "over"},
    "incomplete": {"title": "Not complete", "css": "incomplete"},
    "broken": {"title": "Do not send", "css": "broken"},
}
STATUSES = {"fail": "failed", "not-run": "not run", "pass": "passed"}  # in the order in which checks are listed


def render(audit: Audit) -> str:
    """The whole page."""
    worst = worst_recovery(audit)
    return pages.render(
        TEMPLATE,
        audit=audit,
        verdict=_banner(audit),
        headline=headline(audit),
        attempts=attempts(audit.function),
        counts=dict.fromkeys(STATUSES, 0) | Counter(check.status for check in audit.checked),
        figures=_figures(audit),
        findings=ordered(audit),
        most_findings=MOST_FINDINGS,
        unchecked=[(rule_name(check.rule), check.scope, check.why) for check in unchecked(audit)],
        plots=plots(audit),
        worst=worst,
        measures=MEASURES,
        recoveries=[(found.scope, found.best.attack, *_cells(found.peak)) for found in audit.recovery],
        attacks=[(score.attack, *_cells(score)) for score in worst.attack_table] if worst is not None else [],
        checks=sorted(audit.checked, key=lambda check: list(STATUSES).index(check.status)),
        limits=_limits(audit),
        waivers=_waivers(audit),
        rules=RULES,
        lower_bound=f"{LOWER_BOUND} {NOT_SKILL}",
        severities=SEVERITIES,
        statuses=STATUSES,
        about=about,
        rule_name=rule_name,
        nearly_all_seen=nearly_all_seen(audit.exposure) if audit.exposure is not None else None,
    )


def _banner(audit: Audit) -> dict[str, str]:
    """Title, colour and meaning of the verdict: no green where it leaves skill open."""
    banner, words = VERDICTS[audit.verdict], title(audit)
    if words != audit.verdict:
        banner = {"title": words.capitalize(), "css": "unknown"}
    return banner | {"meaning": meaning(audit)}


def _figures(audit: Audit) -> list[tuple[str, str]]:
    """The large numbers at the top, each with a few words."""
    figures = _skill(audit) + ([] if audit.exposure is None else _seen(audit, audit.exposure))
    worst = worst_recovery(audit)
    if worst is not None:
        peak = worst.peak
        if peak.delta_recovered is not None:
            what = "of the weight difference to the public model recovered (not of skill)"
            figures.append((delta(peak.delta_recovered), what))
        else:
            energy = max(0.0, 1 - 10**peak.log10_nmse)
            figures.append((percent(energy), "of the weights' energy recovered by the best attack (not of skill)"))
        figures.append((percent(peak.exact_share), "of all parameters known bit for bit; skill needs less precision"))
    return figures


def _skill(audit: Audit) -> list[tuple[str, str]]:
    """What an attacker can do comes first."""
    found = audit.function
    if found is None or found.rho is None:
        return []
    figures = [(percent(max(found.rho, 0.0)), "of the model's skill recovered without an example (ρ)")]
    tuned = [point for point in found.curve if point.rho is not None]
    if tuned:
        best = max(tuned, key=lambda point: point.rho or 0.0)
        figures.append((percent(max(best.rho or 0.0, 0.0)), f"of it with {best.public_examples} public examples (ρ)"))
    return figures


def _seen(audit: Audit, exposure: Exposure) -> list[tuple[str, str]]:
    figures = [(percent(exposure.hidden_share), "of all parameters never leave the owner")]
    if exposure.clients:
        worst = max(exposure.clients, key=lambda client: client.shares[-1])
        figures.append((percent(worst.shares[-1]), f"seen by the most exposed client, {worst.client}"))
    if exposure.coalitions:
        wanted = audit.policy.get("threat", {}).get("colluders", 3)
        sizes = {coalition.size: coalition for coalition in exposure.coalitions}
        coalition = sizes.get(wanted, exposure.coalitions[-1])
        figures.append((percent(coalition.share), f"seen by the worst {coalition.size} clients together"))
    return figures


def _cells(score: AttackScore) -> tuple[str, ...]:
    """The values of MEASURES; errors in per cent."""
    return cells(score, lambda log10: percent(10**log10))


def _limits(audit: Audit) -> list[tuple[str, str]]:
    limits, budget = audit.policy.get("limits", {}), audit.policy.get("budget", {})
    rows = [
        (f"{name} {measure.replace('_', ' ')}", f"{value:g}")
        for name in ("proxy", "coalition", "tensor")
        for measure, value in limits.get(name, {}).items()
    ]
    rows += [("parameters in the clear", percent(limits["clear"]))] if limits.get("clear") is not None else []
    return rows + [(f"seen by one {name}", percent(share)) for name, share in budget.items() if share is not None]


def _waivers(audit: Audit) -> list[tuple[str, ...]]:
    fields = ("rule", "tensor", "reason", "owner", "expires")
    return [tuple(waiver[field] for field in fields) for waiver in audit.policy.get("waivers", ())]
