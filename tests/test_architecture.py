"""The map of the code: packages have levels, an import never points upward, no two modules import each other."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import fedqsn_cli

ROOT = Path(fedqsn_cli.__file__).parent

LEVELS = (  # from the ground up; what stands in one row does not import what stands beside it
    ("dtypes", "errors", "linux", "progress", "text", "version"),
    ("console", "html", "kernels", "strictjson", "validate"),
    ("checkpoint", "planning"),
    ("artifacts", "masks", "options"),
    ("crypto", "exposure", "quantization"),
    ("models",),
    ("courier", "export", "inspection", "training"),
    ("auditing", "merging"),
    ("fedqsn_cli",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


@cache
def modules() -> dict[str, ast.Module]:
    """Dotted name inside the package ("" for the package itself) and syntax tree of every module."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def imports(tree: ast.Module, names: set[str]) -> set[str]:
    """Every module of the package that a module imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "fedqsn_cli"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module and node.module.split(".")[0] == "fedqsn_cli":
                inner = node.module.removeprefix("fedqsn_cli").removeprefix(".")
                for alias in node.names:
                    full = f"{inner}.{alias.name}".removeprefix(".")
                    found.add(full if full in names else inner)
    return found


def package(module: str) -> str:
    """The package, or the module of the root, that a module belongs to."""
    return module.split(".")[0] or "fedqsn_cli"


def inner_package(module: str) -> str:
    """The package inside a package that a module belongs to, or "" for none."""
    name = ".".join(module.split(".")[:2])
    return name if (ROOT / name.replace(".", "/") / "__init__.py").exists() and "." in name else ""


@cache
def graph() -> dict[str, set[str]]:
    """Which modules each module imports."""
    trees = modules()
    return {name: imports(tree, set(trees)) for name, tree in trees.items()}


def test_every_package_has_a_level() -> None:
    assert {package(name) for name in modules()} == set(LEVEL)
    assert len(LEVELS) <= 11


def test_no_import_points_upward_or_sideways() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, others in graph().items()
        for other in sorted(others)
        if package(other) != package(name) and LEVEL[package(other)] >= LEVEL[package(name)]
    ]
    assert not wrong


def test_no_modules_import_each_other_in_a_circle() -> None:
    edges = graph()
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(edges[name]):
                if other:  # the package itself is not a part of any chain: it imports lazily
                    visit(other, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_inner_packages_do_not_import_each_other_in_a_circle() -> None:
    """Those of one package; files beside them, such as commands, are not part of any."""
    edges: dict[str, set[str]] = {}
    for name, others in graph().items():
        inner = [inner_package(other) for other in others if package(other) == package(name)]
        edges.setdefault(inner_package(name), set()).update(inner)
    edges.pop("")
    assert set(TopologicalSorter({name: others - {name, ""} for name, others in edges.items()}).static_order()) == {
        ".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("*/*/__init__.py")
    }


def test_the_root_stays_small() -> None:
    assert len(list(ROOT.glob("*.py"))) <= 12


def test_every_package_says_what_it_is_for_and_lists_its_files() -> None:
    for folder in sorted(path.parent for path in ROOT.rglob("__init__.py")):
        if folder == ROOT:
            continue
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
        for path in folder.glob("*.py"):
            assert path.name == "__init__.py" or path.name in text, (
                f"{folder.name}/__init__.py does not list {path.name}"
            )
        for path in folder.iterdir():
            if path.is_dir() and (path / "__init__.py").exists():
                assert f"{path.name}/" in text, f"{folder.name}/__init__.py does not list {path.name}/"
