"""What errors advise: every option and every command that a hint names exists, and every command line can be parsed."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import fedqsn_cli
from fedqsn_cli.cli.app import COMMANDS, build

ROOT = Path(fedqsn_cli.__file__).parent
FOREIGN = {"--help"}  # every command has it


def text_of(node: ast.expr) -> str:
    """The text of a string, with X in place of what is put into it; of a choice between several, all of them."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else "X" for part in node.values)
    children = (child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr))
    return " ".join(filter(None, map(text_of, children)))


@pytest.fixture(scope="module")
def hints() -> list[tuple[str, str]]:
    """(place, text) of everything that is given to an error as its hint, or assigned to a name of hints."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "hint":
                value: ast.expr | None = node.value
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id.lower()
                value = node.value if "hint" in name or name.startswith(("_trust", "_restore", "seal_again")) else None
            else:
                continue
            text = text_of(value) if value is not None else ""
            if "--" in text or "fedqsn " in text:
                found.append((f"{path.relative_to(ROOT)}:{node.lineno if hasattr(node, 'lineno') else 0}", text))
    return found


@cache
def options_of(command: str) -> frozenset[str]:
    return frozenset(name for param in build(command).params for name in (*param.opts, *param.secondary_opts))


def test_there_are_hints_to_look_at(hints: list[tuple[str, str]]) -> None:
    assert len(hints) > 50


def test_every_option_that_a_hint_names_exists(hints: list[tuple[str, str]]) -> None:
    known = frozenset().union(*map(options_of, COMMANDS))
    for place, text in hints:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text)) - FOREIGN
        assert named <= known, f"{place}: {sorted(named - known)}"


def test_every_command_that_a_hint_names_has_the_options_that_it_names(hints: list[tuple[str, str]]) -> None:
    for place, text in hints:
        for line in re.findall(r"'fedqsn ([^']+)'", text):
            command, *words = line.split()
            assert command in COMMANDS or command in ("X", "help"), f"{place}: no command {command}"
            flags = {word for word in words if word.startswith("--")} - {"--help"}
            assert command not in COMMANDS or flags <= options_of(command), f"{place}: {sorted(flags)}"
