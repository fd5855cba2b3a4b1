"""One page for people who decide: verdict, what was seen, what can be recovered. Self-contained, no script.

Everything that comes from a file of somebody else (names of proxies, tensors, clients) is escaped.
"""

from __future__ import annotations

from html import escape

from fedqsn_cli.auditing.findings import Audit, Finding, Recovery
from fedqsn_cli.auditing.report import html_plots as plots
from fedqsn_cli.auditing.report.wording import (
    LOWER_BOUND,
    SEVERITIES,
    delta,
    meaning,
    ordered,
    proxies_to_99,
    rule_name,
    unchecked,
)
from fedqsn_cli.auditing.rules import RULES
from fedqsn_cli.html.parts import document, safe, table
from fedqsn_cli.html.parts import figures as boxes
from fedqsn_cli.text import percent

TITLES = {
    "passed": "Passed",
    "over the limits": "Over the limits",
    "incomplete": "Not complete",
    "broken": "Do not send",
}
CLASSES = {"passed": "passed", "over the limits": "over", "incomplete": "incomplete", "broken": "broken"}
MOST_FINDINGS = 50


def render(audit: Audit) -> str:
    """The whole page."""
    parts = [
        _verdict(audit),
        _figures(audit),
        _findings(audit),
        _unchecked(audit),
        plots.exposure(audit),
        plots.heat_map(audit),
        plots.recovery_and_function(audit),
        _attacks(audit),
        _checks(audit),
        _policy(audit),
        _footer(audit),
    ]
    return document("fedqsn audit", f"fedqsn audit: {audit.verdict}", parts)


def _verdict(audit: Audit) -> str:
    counts = {status: sum(check.status == status for check in audit.checked) for status in ("pass", "fail", "not-run")}
    line = f"{counts['pass']} checks passed, {counts['fail']} failed, {counts['not-run']} could not run."
    return (
        f'<div class="verdict {CLASSES[audit.verdict]}"><strong>{TITLES[audit.verdict]}</strong>'
        f"<span>{escape(meaning(audit))} {line}</span></div>"
    )


def _figures(audit: Audit) -> str:
    figures: list[tuple[str, str]] = []
    if audit.exposure is not None:
        seen = audit.exposure
        figures.append((percent(seen.hidden_share), "of all parameters never leave the owner"))
        if seen.clients:
            worst = max(seen.clients, key=lambda client: client.shares[-1])
            figures.append((percent(worst.shares[-1]), f"seen by the most exposed client, {worst.client}"))
        if seen.coalitions:
            largest = _coalition(audit)
            figures.append((percent(largest.share), f"seen by the worst {largest.size} clients together"))
    worst_recovery = plots.worst_recovery(audit)
    if worst_recovery is not None:
        peak = worst_recovery.peak
        if peak.delta_recovered is not None:
            figures.append((delta(peak.delta_recovered), "of the secret difference to the public model recovered"))
        else:
            figures.append(
                (percent(max(0.0, 1 - 10**peak.log10_nmse)), "of the weights' energy recovered by the best attack")
            )
        figures.append((percent(peak.exact_share), "of all parameters known exactly"))
    if audit.function is not None and audit.function.rho is not None:
        figures.append((percent(max(audit.function.rho, 0.0)), "of the model's function recovered (ρ)"))
    return boxes(figures)


def _coalition(audit: Audit):  # type: ignore[no-untyped-def]
    assert audit.exposure is not None
    wanted = audit.policy.get("threat", {}).get("colluders", 3)
    sizes = {one.size: one for one in audit.exposure.coalitions}
    return sizes.get(wanted, audit.exposure.coalitions[-1])


def _findings(audit: Audit) -> str:
    found = ordered(audit)
    if not found:
        return ""
    shown = "".join(map(_finding, found[:MOST_FINDINGS]))
    more = len(found) - MOST_FINDINGS
    rest = f'<p class="soft">and {more} more; the JSON format lists all.</p>' if more > 0 else ""
    return f"<section><h2>What was found</h2>{shown}{rest}</section>"


def _finding(one: Finding) -> str:
    about = one.scope if one.tensor is None else f"{one.scope}, {one.tensor}"
    mend = "" if one.severity == "info" else f"<br>How to mend it: {safe(RULES[one.rule].fix)}"
    return (
        f'<div class="finding {one.severity}"><b>{safe(about)}: {safe(one.message)}</b>'
        f"<small>{rule_name(one.rule)} ({SEVERITIES[one.severity]}). {safe(RULES[one.rule].why)}{mend}</small></div>"
    )


def _unchecked(audit: Audit) -> str:
    rows = [(rule_name(one.rule), one.scope, one.why) for one in unchecked(audit)]
    if not rows:
        return ""
    lead = "These rules could not be applied, so nothing is known about what they look at."
    listed = table(("rule", "of", "why"), rows, ())
    return f'<section><h2>Not checked</h2><p class="lead">{lead}</p><div class="scroll">{listed}</div></section>'


def _attacks(audit: Audit) -> str:
    if not audit.recovery:
        return ""
    numbers = ("known exactly", "error", "error of what is shown", "cosine", "secret difference")
    worst = plots.worst_recovery(audit)
    scopes = table(("given", "best attack", *numbers), [_row(one.scope, one) for one in audit.recovery], numbers)
    attacks = ""
    if worst is not None:
        rows = [
            (
                one.attack,
                percent(one.exact_share),
                percent(10**one.log10_nmse),
                percent(10**one.log10_nmse_visible),
                f"{one.cosine:.4f}",
                delta(one.delta_recovered),
            )
            for one in worst.attack_table
        ]
        attacks = f"<details><summary>All attacks on {safe(worst.scope)}</summary>"
        attacks += f'<div class="scroll">{table(("attack", *numbers), rows, numbers)}</div></details>'
    lead = (
        "Error is the squared difference to the true weights, divided by their square: 0 % is a perfect copy, "
        "100 % knows nothing."
    )
    return (
        f'<section><h2>The best attack on each proxy</h2><p class="lead">{lead} {LOWER_BOUND}</p>'
        f'<div class="scroll">{scopes}</div>{attacks}</section>'
    )


def _row(scope: str, one: Recovery) -> tuple[str, ...]:
    peak = one.peak
    return (
        scope,
        one.best.attack,
        percent(peak.exact_share),
        percent(10**peak.log10_nmse),
        percent(10**peak.log10_nmse_visible),
        f"{peak.cosine:.4f}",
        delta(peak.delta_recovered),
    )


def _checks(audit: Audit) -> str:
    words = {"pass": "passed", "fail": "failed", "not-run": "not run"}
    rows = "".join(
        f'<tr><td class="{check.status}">{words[check.status]}</td><td>{rule_name(check.rule)}</td>'
        f'<td class="name">{safe(check.scope)}</td><td class="name">{safe(check.why)}</td></tr>'
        for check in sorted(audit.checked, key=lambda check: ("fail", "not-run", "pass").index(check.status))
    )
    checks = f"<table><tr><th></th><th>rule</th><th>of</th><th>what was done</th></tr>{rows}</table>"
    folded = f'<details><summary>{len(audit.checked)} checks</summary><div class="scroll">{checks}</div></details>'
    return f"<section><h2>All checks</h2>{folded}</section>"


def _policy(audit: Audit) -> str:
    limits = audit.policy.get("limits", {})
    rows = [
        (f"{name} {measure.replace('_', ' ')}", f"{value:g}")
        for name in ("proxy", "coalition", "tensor")
        for measure, value in limits.get(name, {}).items()
    ]
    rows += [("parameters in the clear", percent(limits["clear"]))] if limits.get("clear") is not None else []
    rows += [(f"seen by one {k}", percent(v)) for k, v in audit.policy.get("budget", {}).items() if v is not None]
    waivers = audit.policy.get("waivers", [])
    if not rows and not waivers:
        return ""
    limit_table = table(("limit", "value"), rows, ("value",)) if rows else ""
    waived = [(w["rule"], w["tensor"], w["reason"], w["owner"], w["expires"]) for w in waivers]
    extra = f"<h3>Waivers</h3>{table(('rule', 'tensor', 'reason', 'owner', 'until'), waived, ())}" if waived else ""
    folded = f"<details><summary>Limits and waivers</summary>{limit_table}{extra}</details>"
    return f"<section><h2>Policy</h2>{folded}</section>"


def _footer(audit: Audit) -> str:
    named = "".join(
        f'<tr><td class="name">{safe(name)}</td><td class="name"><code>{safe(digest)}</code></td></tr>'
        for name, digest in audit.inputs.items()
    )
    inputs = f"<details><summary>What was audited (SHA-256)</summary><table>{named}</table></details>" if named else ""
    to_99 = ""
    if audit.exposure is not None and audit.exposure.clients:
        to_99 = f" 99 % of what the server mask leaves is seen after {proxies_to_99(audit.exposure.proxies_to_99)}."
    promise = "This page holds no weight, no hidden position and no key."
    return f"<footer>fedqsn {safe(audit.version)}. Exit code {audit.exit_code}.{to_99} {promise}{inputs}</footer>"
