"""The part of a merge's page that is about the updates: how large each one is, where it points, what moved furthest."""

from __future__ import annotations

from collections.abc import Sequence

from fedqsn_cli.html import charts
from fedqsn_cli.html.charts import Bar, Picture
from fedqsn_cli.merging.results import MergedClient, MergeResult
from fedqsn_cli.merging.updates.measures import Movement
from fedqsn_cli.text import number, percent, real

MOST_BARS = 40

COLUMNS = ("client", "examples", "weight", "norm", "cosine", "coverage", "largest tensor", "largest unit", "verdict")
NUMBERS = ("examples", "weight", "norm", "cosine", "coverage")
REFUSED_COLUMNS = ("update", "client", "why")


def pictures(result: MergeResult) -> list[Picture]:
    """Sizes and directions of updates; of many those that point furthest from the merged step."""
    shown = sorted(result.clients, key=_direction)[:MOST_BARS]
    count = len(result.clients)
    least = f"The {MOST_BARS} of {count} that point furthest from it." if count > MOST_BARS else ""
    return [
        Picture(
            "Where updates point",
            f"Cosine of each update and the merged step: 1 is the same way. {least}".strip(),
            charts.bars("Cosine to the merged step", [_cosine_bar(client) for client in shown]),
            [("#6f93e0", "the same way"), ("#d98a86", "the opposite way")],
        ),
        Picture(
            "How large updates are",
            "The unit that moves furthest, in sizes of the weights there. "
            "One that stands out from the others is worth a look.",
            charts.bars("Largest unit", _size_bars(shown)),
        ),
    ]


def rows(clients: Sequence[MergedClient]) -> list[tuple[str, ...]]:
    """All that is known of each update."""
    return [
        (
            client.client,
            number(client.num_examples),
            percent(client.share),
            f"{client.norm:.3g}",
            real(client.cosine),
            percent(client.coverage),
            moved(client.largest_tensor),
            moved(client.largest_unit),
            client.verdict,
        )
        for client in clients
    ]


def refused_rows(result: MergeResult) -> list[tuple[str, str, str]]:
    """The updates that were left out."""
    return [(item.folder, item.client or "-", item.reason) for item in result.refused]


def moved(item: Movement) -> str:
    """A tensor or unit, and how far it moves."""
    place = item.tensor if item.unit is None else f"{item.tensor} unit {item.unit}"
    return f"{place} ({item.ratio:.2g})"


def _direction(client: MergedClient) -> float:
    return 0.0 if client.cosine is None else client.cosine


def _cosine_bar(client: MergedClient) -> Bar:
    value = _direction(client)
    return Bar(client.client, [("main" if value >= 0 else "bad", abs(value))], real(client.cosine))


def _size_bars(clients: Sequence[MergedClient]) -> list[Bar]:
    most = max((client.largest_unit.ratio for client in clients), default=0.0) or 1.0
    return [
        Bar(client.client, [("main", client.largest_unit.ratio / most)], f"{client.largest_unit.ratio:.2g}")
        for client in clients
    ]
