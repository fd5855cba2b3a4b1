"""The page of `merge --report`: the losses that auto measured, and the updates. Self-contained, no script.

It is the owner's: it names clients and units that moved far. It shows no weight, hidden position or key.
"""

from __future__ import annotations

import math
from pathlib import Path

from markupsafe import Markup

from fedqsn_cli.html import charts, pages
from fedqsn_cli.html.charts import Level, Line, Picture, Plot
from fedqsn_cli.merging.ending.line_search import Point, Search
from fedqsn_cli.merging.report import page_updates
from fedqsn_cli.merging.results import MergeResult
from fedqsn_cli.text import number, percent, real
from fedqsn_cli.version import VERSION

TEMPLATE = Path(__file__).parent / "page.html.j2"

_WORDS = {
    "--blend": ("blend", "How much of the hidden neurons comes back", "λ: 0 leaves hidden neurons out, 1 puts them in"),
    "--server-lr": ("step", "How far the updates move the model", "η: 0 is the model before, 1 the average as it is"),
}


def render(result: MergeResult) -> str:
    """The whole page, of a merge or a restore."""
    search = result.search
    return pages.render(
        TEMPLATE,
        command="merge",
        title=f"{search.option} {search.chosen:g}" if search else f"{len(result.clients)} updates",
        figures=_figures(search) if search else _counts(result),
        search=_search_parts(search) if search else None,
        pictures=page_updates.pictures(result) if result.clients else [],
        clients=(page_updates.COLUMNS, page_updates.rows(result.clients), page_updates.NUMBERS),
        refused=(page_updates.REFUSED_COLUMNS, page_updates.refused_rows(result)),
        version=VERSION,
    )


def _counts(result: MergeResult) -> list[tuple[str, str]]:
    """What a merge without a search did, in a few numbers."""
    return [
        (number(len(result.clients)), "updates were merged"),
        (number(len(result.refused)), "were refused"),
        (percent(result.covered), "of all parameters were trained"),
    ]


def _figures(search: Search) -> list[tuple[str, str]]:
    chosen = search.at(search.chosen)
    figures = [(f"{search.chosen:g}", f"was taken for {search.option}"), (real(chosen.loss), "loss there")]
    return figures + [(real(point.loss), caption) for point, caption in _references(search)]


def _search_parts(search: Search) -> dict[str, object]:
    """The plot of a search, and the table of all that was tried."""
    name, title, axis = _WORDS[search.option]
    lead = (
        f"Loss on {number(search.examples)} examples of the owner's development data for each {name} that was tried; "
        f"{name} {search.chosen:g} was taken."
    )
    dashed = [("#17693f", "the model before")] if _levels(search) else []
    plot = Picture(title, lead, _plot(search, axis), [("#8aa5dd", "tried"), ("#2456c8", "taken")], dashed)
    return {"plot": plot, "columns": (name, "loss", search.metric, ""), "rows": _rows(search)}


def _references(search: Search) -> list[tuple[Point, str]]:
    """The losses to compare the choice with."""
    if search.option == "--server-lr":
        return [(search.at(0.0), "loss of the model before"), (search.at(1.0), "loss at step 1, the plain average")]
    return [(search.at(1.0), "loss with hidden neurons in full"), (search.at(0.0), "loss without them")]


def _finite(search: Search) -> list[tuple[float, float]]:
    return [(point.value, point.loss) for point in search.curve if math.isfinite(point.loss)]


def _plot(search: Search, axis: str) -> Markup:
    points = _finite(search)
    losses = [loss for _, loss in points]
    margin = 0.08 * (max(losses) - min(losses)) or 0.05 * max(losses) or 1.0
    digits = max(0, 1 - math.floor(math.log10(10 * margin)))
    parts = 4 if search.option == "--blend" else 2
    whole = sorted(point.value for point in search.curve if point.value * parts % 1 == 0)
    ticks = [(value, f"{value:g}") for value in whole if points[0][0] <= value <= points[-1][0]]
    lines = [Line("series", points, "loss"), Line("worst", [(search.chosen, search.at(search.chosen).loss)], "taken")]
    return charts.draw(
        Plot(
            "Loss on development data",
            axis,
            lines,
            _levels(search),
            ticks=ticks,
            low=max(0.0, min(losses) - margin),
            high=max(losses) + margin,
            number=lambda loss: f"{loss:.{digits}f}",
        )
    )


def _levels(search: Search) -> list[Level]:
    start = search.at(0.0).loss
    return [Level("ceiling", start)] if search.option == "--server-lr" and math.isfinite(start) else []


def _rows(search: Search) -> list[tuple[str, ...]]:
    """All that was tried."""
    return [
        (
            f"{point.value:g}",
            real(point.loss),
            real(getattr(point, search.metric)),
            "taken" if point.value == search.chosen else "",
        )
        for point in search.curve
    ]
