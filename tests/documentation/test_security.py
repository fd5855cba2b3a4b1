"""The table of docs/security.md is complete: every attacker has rows, and every test that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text()
TESTS = ROOT / "tests"


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its head."""
    part = PAGE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


ATTACKS = rows("Attacks, defences, tests")


@pytest.mark.parametrize("row", ATTACKS, ids=lambda row: row[1])
def test_every_test_that_the_table_names_exists(row: list[str]) -> None:
    who, attack, defence, tests = row
    assert who and attack and defence and named(tests)
    for name in named(tests):
        path, _, function = name.partition("::")
        tree = ast.parse((TESTS / path).read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert function in functions if function else any(each.startswith("test_") for each in functions), name


def test_every_attacker_of_the_overview_has_a_row() -> None:
    attackers = {re.sub(r"\[(.+?)\].*", r"\1", row[0]) for row in rows("Overview")}
    assert attackers == {row[0] for row in ATTACKS} - {"an accident"}


def test_every_test_of_attacks_and_of_invariants_about_strangers_is_in_the_table() -> None:
    listed = {name.split("::")[0] for row in ATTACKS for name in named(row[3])}
    wanted = {f"attacks/{path.name}" for path in (TESTS / "attacks").glob("test_*.py")}
    wanted |= {f"invariants/test_i{number}_" for number in (1, 2, 3, 5, 6, 11)}
    assert not [name for name in wanted if not any(each.startswith(name) for each in listed)]


@pytest.mark.parametrize("path", [".github/workflows/release.yml", "examples/ci/github.yml"])
def test_actions_are_pinned_by_digest(path: str) -> None:
    jobs = yaml.safe_load((ROOT / path).read_text())["jobs"].values()
    actions = [step["uses"] for job in jobs for step in job["steps"] if "uses" in step]
    assert actions
    assert all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action) for action in actions)


REPORTS = {
    '{"dependencies": [{"name": "a", "version": "1", "vulns": []}]}': 0,
    '{"dependencies": [{"name": "a", "version": "1", "vulns": [{"id": "X-1", "fix_versions": ["2"]}]}]}': 1,
    '{"dependencies": [{"name": "a", "skip_reason": "unknown"}]}': 3,
    '{"dependencies": []}': 3,
    "": 3,
}


@pytest.mark.parametrize("report", REPORTS)
def test_what_was_not_looked_up_is_no_clean_result(report: str, tmp_path: Path) -> None:
    scope: dict[str, object] = {"__name__": "deps_verdict"}
    exec((ROOT / ".ci" / "deps_verdict.py").read_text(), scope)
    code, lines = scope["verdict"](report)  # type: ignore[operator]
    assert code == REPORTS[report]
    assert lines
