"""Benchmarks and the study take from the package what is there: most of them are run by hand, long after a change."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FILES = [path for path in sorted(BENCHMARKS.rglob("*.py")) if "fedqsn_cli" in path.read_text("utf-8")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(BENCHMARKS).as_posix())
def test_what_a_benchmark_imports_is_there(path: Path) -> None:
    missing = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fedqsn_cli":
            module = importlib.import_module(node.module or "")
            missing += [f"{node.module}.{name.name}" for name in node.names if not has(module.__name__, name.name)]
    assert missing == []


def has(module: str, name: str) -> bool:
    """Is it an attribute of the module, or a module in it?"""
    if hasattr(importlib.import_module(module), name):
        return True
    try:
        importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError:
        return False
    return True
