"""Markdown for the summary of a CI step or a comment: short, with the measurements folded away."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fedqsn_cli.auditing.findings import Audit
from fedqsn_cli.auditing.report.common import LOWER_BOUND, meaning, ordered, verdict
from fedqsn_cli.auditing.report.text import MOST_FINDINGS, NOT_CHECKED
from fedqsn_cli.auditing.report.text import parts as text_parts
from fedqsn_cli.auditing.rules import RULES
from fedqsn_cli.console import Facts, Part, Table
from fedqsn_cli.text import clean

SIGNS = {"passed": "✅", "over the limits": "❌", "incomplete": "⚠️", "broken": "⛔"}
WORDS = {"hard": "hard", "gate": "limit", "incomplete": "incomplete", "info": "note"}


def render(audit: Audit) -> str:
    """Verdict and findings in sight, the rest under a fold."""
    lines = [f"## {SIGNS[audit.verdict]} fedqsn audit: {verdict(audit)}", "", meaning(audit), ""]
    found = ordered(audit)
    if found:
        rows = [
            (f"{one.rule} {RULES[one.rule].name}", WORDS[one.severity], one.scope, one.tensor or "-", one.message)
            for one in found[:MOST_FINDINGS]
        ]
        lines += [*table(("rule", "kind", "scope", "tensor", "what is wrong"), rows), ""]
        if len(found) > len(rows):
            lines += [escape(f"... and {len(found) - len(rows)} findings more (--format json lists all)"), ""]
    parts = text_parts(audit)[1:]
    for part in parts:
        if isinstance(part, Table) and part.columns[0] == NOT_CHECKED:
            lines += [*_part(part), ""]
    shown = {"rule", NOT_CHECKED}
    rest = [part for part in parts if not (isinstance(part, Table) and part.columns[0] in shown)]
    lines += ["<details><summary>What was measured</summary>", ""]
    for part in rest:
        lines += [*_part(part), ""]
    return "\n".join([*lines, "</details>", ""])


def _part(part: Part) -> list[str]:
    if isinstance(part, str):
        return [f"*{escape(part)}*" if part == LOWER_BOUND else escape(part)]
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
