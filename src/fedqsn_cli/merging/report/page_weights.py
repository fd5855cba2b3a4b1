"""The page of `consolidate --report`: what each weight of the clients' teacher keeps and brings. Self-contained.

It is the owner's: it shows no weight of a model, hidden position or key.
"""

from __future__ import annotations

import math

from fedqsn_cli.html import charts, pages
from fedqsn_cli.html.charts import Level, Line, Picture, Plot
from fedqsn_cli.merging.ending.weight_search import WeightSearch
from fedqsn_cli.merging.report.page import TEMPLATE
from fedqsn_cli.text import number, real
from fedqsn_cli.version import VERSION

_OWN, _CLIENTS, _LIMIT = "#8aa5dd", "#2456c8", "#17693f"


def render(search: WeightSearch) -> str:
    """The whole page."""
    taken = next(trial for trial in search.trials if trial.weight == search.chosen)
    figures = [
        (f"{search.chosen:g}", "was taken for --transfer-weight"),
        (f"{real(search.own_before.loss)} → {real(taken.own.loss)}", "loss on your own skill"),
        (f"{real(search.clients_before.loss)} → {real(taken.clients.loss)}", "loss on what clients teach"),
    ]
    columns = ("weight", "loss on your own skill", "on what clients teach", "")
    return pages.render(
        TEMPLATE,
        command="consolidate",
        title=f"--transfer-weight {search.chosen:g}",
        figures=figures,
        search={"plot": _picture(search), "columns": columns, "rows": search.rows("taken")},
        pictures=[],
        refused=((), []),
        version=VERSION,
    )


def _picture(search: WeightSearch) -> Picture:
    own = [(trial.weight, trial.own.loss - search.own_before.loss) for trial in search.trials]
    clients = [(trial.weight, trial.clients.loss - search.clients_before.loss) for trial in search.trials]
    changes = [change for _, change in own + clients] + [search.tolerance, 0.0]
    margin = 0.08 * (max(changes) - min(changes)) or 1.0
    digits = max(0, 1 - math.floor(math.log10(10 * margin)))
    plot = Plot(
        "Change of loss on development data",
        "w: how much the clients' teacher counts",
        [Line("series", own, "your own skill"), Line("worst", clients, "what clients teach")],
        [Level("ceiling", search.tolerance)],
        ticks=[(trial.weight, f"{trial.weight:g}") for trial in search.trials],
        low=min(changes) - margin,
        high=max(changes) + margin,
        number=lambda change: f"{change:.{digits}f}",
    )
    lead = (
        f"Change of the global model's loss on {number(search.own_before.examples)} examples of your own skill and "
        f"{number(search.clients_before.examples)} of what clients teach, for each weight that was tried; "
        f"{search.chosen:g} was taken."
    )
    key = [(_OWN, "your own skill"), (_CLIENTS, "what clients teach")]
    dashed = [(_LIMIT, "the most that your own skill may lose")]
    return Picture("How much the clients' teacher counts", lead, charts.draw(plot), key, dashed)
