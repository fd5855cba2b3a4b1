"""Annotations of a GitHub workflow: `::error title=...::message`, one a finding, and a line with the verdict."""

from __future__ import annotations

from fedqsn_cli.auditing.findings import Audit, Finding
from fedqsn_cli.auditing.report.headline import headline
from fedqsn_cli.auditing.report.wording import about, meaning, ordered, rule_name, verdict
from fedqsn_cli.text import clean

COMMANDS = {"hard": "error", "gate": "error", "incomplete": "error", "info": "notice"}


def render(audit: Audit) -> str:
    """All findings, the worst first: a site that shows only some shows those."""
    lines = [_annotation(finding) for finding in ordered(audit)]
    last = f"::{'notice' if audit.exit_code == 0 else 'error'} title=fedqsn audit::"
    skill = "".join(f" {name}: {value.rstrip('.')}." for name, value in headline(audit))
    return "\n".join([*lines, last + _data(f"{verdict(audit)}: {meaning(audit)}{skill}"), ""])


def _annotation(finding: Finding) -> str:
    head = f"::{COMMANDS[finding.severity]} title={_property(rule_name(finding.rule))}"
    return f"{head}::{_data(f'{about(finding)}: {finding.message}')}"


def _data(text: str) -> str:
    """A message: per cent signs and line ends would end or change the command."""
    return clean(text.replace("\r", " ").replace("\n", " ")).replace("%", "%25")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
