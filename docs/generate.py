"""Write docs/commands/, a page a command from its own --help, and docs/rules.md from the audit's table of rules.

`--check` only tells whether they are up to date.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ |= {"COLUMNS": "100", "NO_COLOR": "1"}  # the same text on every terminal

from fedqsn_cli.auditing.registry import Rule, needed
from fedqsn_cli.auditing.rules import RULES
from fedqsn_cli.cli.app import COMMANDS, function_of, help_of

DOCS = Path(__file__).parent
FOLDER = DOCS / "commands"

KINDS = {
    "hard": "hard: exit code 4, never waivable",
    "gate": "limit: exit code 1, can be waived for a time",
    "incomplete": "not complete: exit code 3, never a pass",
}


def pages() -> dict[str, str]:
    """File name and text of every page."""
    made = {f"{command}.md": page(command) for command in COMMANDS}
    rows = [f"| [`fedqsn {command}`]({command}.md) | {summary(command)} |" for command in COMMANDS]
    table = "\n".join(["| command | what it does |", "|---|---|", *rows])
    made["README.md"] = f"# Commands\n\n{table}\n\n```text\n$ fedqsn --help\n{help_of(None)}\n```\n"
    return made


def page(command: str) -> str:
    return f"# fedqsn {command}\n\n{summary(command)}\n\n```text\n$ fedqsn {command} --help\n{help_of(command)}\n```\n"


def summary(command: str) -> str:
    return str(function_of(command).__doc__).split("\n\n")[0]


def rules() -> str:
    """docs/rules.md: all rules of the audit."""
    rows = [f"| [{rule.id}](#{rule.anchor}) | {rule.name} | {rule.severity} |" for rule in RULES.values()]
    table = "\n".join(["| rule | name | kind |", "|---|---|---|", *rows])
    lead = "What [`fedqsn audit`](audit.md) checks. Ids are stable; formats and policies name rules by them."
    return "\n\n".join(["# Rules", lead, table, *map(_rule, RULES.values())]) + "\n"


def _rule(rule: Rule) -> str:
    head = f"## {rule.id} {rule.name}\n\n*{KINDS[rule.severity]}*"
    if rule.needs:
        text = needed(*rule.needs).capitalize()
        scope = f"Part of the scope `{rule.scope}`. " if rule.scope else ""
        head += f"\n\n{scope}{text}."
    return f"{head}\n\n{rule.what}\n\n**Why.** {rule.why}\n\n**How to fix.** {rule.fix}"


def main() -> int:
    wanted = {FOLDER / name: text for name, text in pages().items()} | {DOCS / "rules.md": rules()}
    found = {path: path.read_text("utf-8") for path in (*FOLDER.glob("*.md"), DOCS / "rules.md") if path.exists()}
    if "--check" in sys.argv[1:]:
        stale = sorted(path.name for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path))
        if stale:
            print(f"docs are not up to date ({', '.join(stale)}); run 'make docs'", file=sys.stderr)
        return 1 if stale else 0
    FOLDER.mkdir(exist_ok=True)
    for path in found.keys() - wanted.keys():
        path.unlink()
    for path, text in wanted.items():
        path.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
