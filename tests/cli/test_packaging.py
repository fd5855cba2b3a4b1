"""What is installed: versions pinned for the tests, ranges for users, data files in the package."""

from __future__ import annotations

import re
import tomllib
from importlib import resources
from pathlib import Path

import fedqsn_cli
from support.processes import process

ROOT = Path(__file__).parents[2]


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]  # type: ignore[no-any-return]


def pins() -> dict[str, str]:
    lines = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#"))
    return dict(line.split("==") for line in lines)


def direct() -> dict[str, str]:
    """Name and lowest version of everything that pyproject.toml names."""
    found = project()
    extras: dict[str, list[str]] = found["optional-dependencies"]  # type: ignore[assignment]
    asked = [*found["dependencies"], *(one for extra in extras.values() for one in extra)]  # type: ignore[misc]
    return dict(requirement.split(">=") for requirement in asked if not requirement.startswith("fedqsn-cli["))


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def test_every_direct_dependency_is_pinned_within_its_range() -> None:
    for name, lowest in direct().items():
        assert version(pins()[name]) >= version(lowest), name


def test_no_index_is_named_anywhere() -> None:
    for name in ("pyproject.toml", "constraints.txt", "Makefile", ".ci/run"):
        text = (ROOT / name).read_text()
        assert "index-url" not in text and "://" not in text, name


def test_the_rules_and_the_type_marker_are_part_of_the_package() -> None:
    package = resources.files("fedqsn_cli")
    for name in (
        "py.typed",
        "planning/rules.toml",
        "auditing/policy.toml",
        "html/page.css",
        "html/frame.html.j2",
        "auditing/report/report.html.j2",
    ):
        assert package.joinpath(name).is_file(), name


def test_the_program_tells_its_version() -> None:
    assert process("--version").out == f"fedqsn {fedqsn_cli.__version__}\n"


def test_the_changelog_has_a_place_for_what_comes_next() -> None:
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()
