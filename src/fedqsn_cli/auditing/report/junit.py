"""JUnit XML: one test case a rule and scope, so that every CI system shows what was checked."""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr

from fedqsn_cli.auditing.findings import Audit, Check, Finding
from fedqsn_cli.auditing.report.headline import headline
from fedqsn_cli.auditing.report.wording import meaning, rule_name
from fedqsn_cli.auditing.rules import RULES
from fedqsn_cli.text import clean

Case = tuple[str, str]  # rule, scope


def render(audit: Audit) -> str:
    """One suite; findings without a check (an unreadable proxy, say) are cases of their own."""
    checks: dict[Case, list[Check]] = {}
    findings: dict[Case, list[Finding]] = {}
    for check in audit.checked:
        checks.setdefault((check.rule, check.scope), []).append(check)
    for finding in audit.findings:
        if finding.severity != "info":
            findings.setdefault((finding.rule, finding.scope), []).append(finding)
    cases = [*checks, *(case for case in findings if case not in checks)]
    bodies = [_case(case, checks.get(case, []), findings.get(case, [])) for case in cases]
    count = {kind: sum(f"<{kind} " in body for body in bodies) for kind in ("failure", "error", "skipped")}
    totals = f'tests="{len(cases)}" failures="{count["failure"]}" errors="{count["error"]}"'
    suite = f'  <testsuite name="fedqsn audit" {totals} skipped="{count["skipped"]}">'
    return "\n".join(
        [
            '<?xml version="1.0" encoding="UTF-8"?>',
            f'<testsuites name="fedqsn audit" {totals}>',
            suite,
            *_properties(audit),
            *bodies,
            "  </testsuite>",
            "</testsuites>",
            "",
        ]
    )


def _properties(audit: Audit) -> list[str]:
    lines = [("meaning", meaning(audit)), *headline(audit)]
    shown = [f"      <property name={_attribute(name)} value={_attribute(value)}/>" for name, value in lines]
    return ["    <properties>", *shown, "    </properties>"]


def _case(case: Case, checks: list[Check], findings: list[Finding]) -> str:
    rule, scope = case
    head = f"    <testcase classname={_attribute(rule_name(rule))} name={_attribute(scope)}"
    if findings:
        kind = "error" if RULES[rule].severity == "incomplete" else "failure"
        lines = [f"{found.tensor}: {found.message}" if found.tensor else found.message for found in findings]
        text = escape("\n".join(clean(line) for line in [*lines, f"How to fix: {RULES[rule].fix}"]))
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        start = f"<{kind} type={_attribute(rule)} message={_attribute(lines[0] + more)}>"
        return f"{head}>\n      {start}{text}</{kind}>\n    </testcase>"
    if checks and all(check.status == "not-run" for check in checks):
        return f"{head}>\n      <skipped message={_attribute(checks[0].why)}/>\n    </testcase>"
    reasons = "\n".join(clean(check.why) for check in checks)
    return f"{head}>\n      <system-out>{escape(reasons)}</system-out>\n    </testcase>"


def _attribute(text: str) -> str:
    return quoteattr(clean(text))
