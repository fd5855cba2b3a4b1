"""results.json, plots and the tables of README.md: everything that is said about the study comes from its cells."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.study import figures, plots, runner, tables
from benchmarks.study.figures import Results, Row
from benchmarks.study.settings import Cell

BEGIN, END = "<!-- {name}: generated -->", "<!-- end of {name} -->"


def write(found: Sequence[Cell], work: Path, out: Path) -> None:
    """Write the report of the cells that are there."""
    pairs = [(cell, runner.load(cell, work)) for cell in found]
    out.mkdir(parents=True, exist_ok=True)
    document = collected(pairs)
    (out / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    publish(figures.table_of(pairs), out)


def publish(results: Results, out: Path) -> None:
    """Plots and tables."""
    rows = figures.rows(results)
    for name, drawing in plots.all_plots(results, rows).items():
        (out / name).write_text(drawing, "utf-8")
    readme = out / "README.md"
    if readme.is_file():
        readme.write_text(filled(readme.read_text("utf-8"), tables.all_tables(results, rows)), "utf-8")


def collected(pairs: Sequence[tuple[Cell, dict[str, Any] | None]]) -> dict[str, Any]:
    """All cells as one document; machine and versions once where they are the same for all."""
    cells = [result for _, result in pairs if result is not None]
    rows = figures.rows(figures.table_of(pairs))
    return {
        "missing": [cell.name for cell, result in pairs if result is None],
        "failed": [result["name"] for result in cells if "error" in result],
        "machines": _different(cells, "machine"),
        "versions": _different(cells, "versions"),
        "figures": [_plain(row) for row in rows],
        "cells": [{key: value for key, value in one.items() if key not in {"machine", "versions"}} for one in cells],
    }


def _different(cells: Sequence[dict[str, Any]], key: str) -> list[Any]:
    found: list[Any] = []
    for cell in cells:
        if cell.get(key) not in found:
            found.append(cell.get(key))
    return found


def _plain(row: Row) -> dict[str, Any]:
    return asdict(row)


def filled(text: str, parts: dict[str, str]) -> str:
    """A page with new text between its markers.

    Raises:
        ValueError: a marker is missing.
    """
    for name, part in parts.items():
        begin, end = BEGIN.format(name=name), END.format(name=name)
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"the page has no place for {name}")
        text = f"{before}{begin}\n\n{part}\n\n{end}{after}"
    return text
