"""What kernels may not use, because loading the finished machine code would import it again in every process."""

from __future__ import annotations

import ast
from pathlib import Path

import fedqsn_cli

ROOT = Path(fedqsn_cli.__file__).parent
WITH_SCIPY = {"sum", "mean", "min", "max", "any", "all", "dot", "prod", "cumsum", "argmin", "argmax"}
"""Methods and functions of arrays that numba keeps beside its linear algebra, which imports scipy."""


def kernels(path: Path) -> list[ast.FunctionDef]:
    """The functions of a file that are compiled."""
    return [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(mark, ast.Name) and mark.id == "kernel" for mark in node.decorator_list)
    ]


def test_no_kernel_needs_scipy() -> None:
    found = {path: kernels(path) for path in sorted(ROOT.rglob("*.py")) if "@kernel" in path.read_text()}
    assert len(list(filter(None, found.values()))) > 10
    for path, compiled in found.items():
        calls = [node.func for kernel in compiled for node in ast.walk(kernel) if isinstance(node, ast.Call)]
        used = [f"line {call.lineno}: {call.attr}" for call in calls if isinstance(call, ast.Attribute)]
        assert [call for call in used if call.split()[-1] in WITH_SCIPY] == [], path
