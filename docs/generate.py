"""Write docs/commands/, a page a command, from its own --help. `--check` only tells whether they are up to date."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ |= {"COLUMNS": "100", "NO_COLOR": "1"}  # the same text on every terminal

from fedqsn_cli.cli.app import COMMANDS, function_of, help_of

FOLDER = Path(__file__).parent / "commands"


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


def main() -> int:
    wanted = pages()
    found = {path.name: path.read_text() for path in FOLDER.glob("*.md")}
    if "--check" in sys.argv[1:]:
        stale = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        if stale:
            print(f"docs/commands is not up to date ({', '.join(stale)}); run 'make docs'", file=sys.stderr)
        return 1 if stale else 0
    FOLDER.mkdir(exist_ok=True)
    for name in found.keys() - wanted.keys():
        (FOLDER / name).unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
