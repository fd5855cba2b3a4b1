"""The report for people at a terminal: verdict, findings, then the measurements."""

from __future__ import annotations

from fedqsn_cli import console
from fedqsn_cli.auditing.findings import Audit
from fedqsn_cli.auditing.report.sections import sections
from fedqsn_cli.console import Part


def render(audit: Audit) -> str:
    """The parts as plain text."""
    return console.as_text(parts(audit))


def parts(audit: Audit) -> list[Part]:
    """The report from top to bottom, as the console takes it."""
    return [part for section in sections(audit) for part in (*section.parts, *([section.note] if section.note else []))]
