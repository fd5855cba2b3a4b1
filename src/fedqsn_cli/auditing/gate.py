"""From measurements to findings: limits, what is required, and waivers."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import replace

from fedqsn_cli.auditing.completeness import MISSING_INPUT, WAIVER_EXPIRED, Collector
from fedqsn_cli.auditing.findings import Check, Finding
from fedqsn_cli.auditing.limits.measured import Measured
from fedqsn_cli.auditing.policy import Policy
from fedqsn_cli.auditing.registry import Rule, needed
from fedqsn_cli.auditing.rules import LIMITS, RULES, required


def evaluate_policy(
    policy: Policy, measured: Measured, collected: Collector, *, today: datetime.date
) -> tuple[tuple[Finding, ...], tuple[Check, ...]]:
    """All findings and checks of an audit, those of the limits included.

    Args:
        collected: what the invariants and the attacks gave; the limits are added to it.
        today: what the dates of waivers are held against.
    """
    for limit in LIMITS:
        collected.add(limit.run(policy, measured))
    _require(collected, required(policy))
    return tuple(_waived(collected.findings, policy, today)), tuple(collected.checks)


def _require(collected: Collector, required: frozenset[str]) -> None:
    """A required rule that was not applied, somewhere or anywhere, makes the audit incomplete."""
    for check in list(collected.checks):
        if check.status == "not-run" and check.rule in required:
            message = f"{_named(RULES[check.rule])} is required but could not be checked: {check.why}"
            collected.add([MISSING_INPUT.finding(check.scope, message)])
    applied = {check.rule for check in collected.checks}
    for rule in [RULES[name] for name in sorted(required - applied)]:
        why = needed(*rule.needs) if rule.needs else "needs more inputs"
        message = f"{_named(rule)} is required but was not checked: {why}"
        collected.add([rule.not_run("audit", why), MISSING_INPUT.finding("audit", message)])


def _named(rule: Rule) -> str:
    return f"{rule.id} ({rule.name})"


def _waived(findings: Sequence[Finding], policy: Policy, today: datetime.date) -> Iterator[Finding]:
    """The findings, those that a waiver covers turned into information; waivers that have expired are findings too."""
    used = set()
    for finding in findings:
        covering = [waiver for waiver in policy.waiver if finding.severity == "gate" and waiver.covers(finding)]
        used.update(covering)
        valid = next((waiver for waiver in covering if waiver.expires >= today), None)
        if valid is None:
            yield finding
        else:
            note = f"{finding.message} (waived until {valid.expires.isoformat()} by {valid.owner}: {valid.reason})"
            yield replace(finding, severity="info", message=note)
    for waiver in policy.waiver:
        name = f"the waiver of {waiver.rule} for tensor {waiver.tensor!r} by {waiver.owner}"
        if waiver.expires < today:
            yield WAIVER_EXPIRED.finding("policy", f"{name} expired on {waiver.expires.isoformat()}")
        elif waiver not in used:
            yield replace(WAIVER_EXPIRED.finding("policy", f"{name} covers nothing that was found"), severity="info")
