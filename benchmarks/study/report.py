"""results.json, plots and the tables of README.md: everything that is said about the study comes from its cells."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.study import figures, plots, runner, tables
from benchmarks.study.figures import Results, Row
from benchmarks.study.settings import Cell

RESULTS = "results.json"
SHARED = {"machine": "machines", "versions": "versions"}  # of a cell: where a document has it
BEGIN, END = "<!-- {name}: generated -->", "<!-- end of {name} -->"


def write(found: Sequence[Cell], work: Path, out: Path) -> None:
    """Write the report of the cells that are there."""
    pairs = [(cell, runner.load(cell, work)) for cell in found]
    out.mkdir(parents=True, exist_ok=True)
    document = collected(pairs)
    (out / RESULTS).write_text(json.dumps(document, indent=1) + "\n")
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
    once = {plural: _different(cells, key) for key, plural in SHARED.items()}
    return {
        "missing": [cell.name for cell, result in pairs if result is None],
        "failed": [result["name"] for result in cells if "error" in result],
        **once,
        "figures": [_plain(row) for row in rows],
        "cells": [one | {key: once[plural].index(one.get(key)) for key, plural in SHARED.items()} for one in cells],
    }


def published(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The cells of a document as they were collected."""
    for one in document["cells"]:
        yield one | {key: document[plural][one[key]] for key, plural in SHARED.items()}


def adopt(found: Sequence[Cell], work: Path, out: Path) -> int:
    """Take over cells of the published report that are not there; returns how many. Other settings are other cells."""
    known = {one["name"]: one for one in published(json.loads((out / RESULTS).read_text()))}
    taken = 0
    for cell in found:
        result = known.get(cell.name)
        if result is not None and result["settings"] == cell.settings and not runner.done(cell, work):
            runner.keep(cell, work, result)
            taken += 1
    return taken


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
