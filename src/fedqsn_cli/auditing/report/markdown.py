"""Markdown for the summary of a CI step or a comment: short, with the measurements folded away."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fedqsn_cli.auditing.findings import Audit
from fedqsn_cli.auditing.report.headline import doubts
from fedqsn_cli.auditing.report.sections import Section, sections
from fedqsn_cli.auditing.report.wording import meaning, verdict
from fedqsn_cli.console import Facts, Part
from fedqsn_cli.text import clean

SIGNS = {"passed": "✅", "over the limits": "❌", "incomplete": "⚠️", "broken": "⛔"}
NO_SIGN = "⚪"  # nothing is wrong, but nothing is known about skill
IN_SIGHT = ("headline", "findings", "not checked")


def render(audit: Audit) -> str:
    """Verdict and findings in sight, the rest under a fold."""
    report = [section for section in sections(audit) if section.kind != "verdict"]
    sign = SIGNS[audit.verdict] if audit.exit_code or not doubts(audit) else NO_SIGN
    lines = [f"## {sign} fedqsn audit: {verdict(audit)}", "", meaning(audit), ""]
    lines += [line for section in report if section.kind in IN_SIGHT for line in _section(section)]
    lines += ["<details><summary>What was measured</summary>", ""]
    lines += [line for section in report if section.kind not in IN_SIGHT for line in _section(section)]
    return "\n".join([*lines, "</details>", ""])


def _section(section: Section) -> list[str]:
    lines = [line for part in section.parts for line in (*_part(part), "")]
    return lines if section.note is None else [*lines, f"*{escape(section.note)}*", ""]


def _part(part: Part) -> list[str]:
    if isinstance(part, str):
        return [escape(part)]
    if isinstance(part, Facts):
        return table(("", ""), [(name, value) for name, value in part.rows if value is not None])
    return table(part.columns, part.rows, part.numbers)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], numbers: frozenset[str] = frozenset()) -> list[str]:
    """A table in the dialect that code sites share."""
    rule = ["---:" if name in numbers else "---" for name in columns]
    body = [[escape(str(cell)) for cell in row] for row in rows]
    return ["| " + " | ".join(cells) + " |" for cells in ([escape(name) for name in columns], rule, *body)]


def escape(text: str) -> str:
    """Text that means itself: no table cells, markup, HTML, links or mentions out of names of others."""
    return re.sub(r"([\\`*_{}\[\]<>|~#@])", r"\\\1", clean(text))
