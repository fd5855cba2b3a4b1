"""The plots of the study: what is lost against what leaks, attacks over public examples, blends."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.study.figures import Results, Row, keeps_a, share, spread, spread_at
from benchmarks.study.settings import ENDED, LONG, METHODS, NEWS, NO_BASE, RELATED, SIZES, TOPICS, Method
from benchmarks.study.svg import COLOURS, Panel, legend, page, steps

TASKS = {TOPICS.name: "Topics (MiniLM encoder)", NEWS.name: "News (small Llama)"}
SMALL_TASKS = {RELATED.name: "Related (tiny Llama)", NO_BASE.name: "No public base (tiny Llama)"}
SHOWN_WEIGHT = 0.75
LINES = ("red", "amber", "blue", "green", "violet", "grey")


def all_plots(results: Results, rows: Sequence[Row]) -> dict[str, str]:
    """Every plot by its file name."""
    return {"picture.svg": picture(rows), "attacks.svg": attacks(results, rows), "blends.svg": blends(results)}


def colour_of(method: Method) -> str:
    """One colour for each idea."""
    if method.train == "all":
        return COLOURS["green"]
    if method.fill == "base":
        return COLOURS["blue"]
    if method.p1 > 0:
        return COLOURS["red"]
    return COLOURS["violet"] if method.kind in {"lora", "offsite"} else COLOURS["grey"]


def picture(rows: Sequence[Row]) -> str:
    """What a method keeps of FedAvg's gain, against what the best attacker gets of the secret."""
    shown = [(str(number), method) for number, method in enumerate(_measured(rows), 1)]
    panels = []
    for number, (task, title) in enumerate((TASKS | SMALL_TASKS).items()):
        panel = Panel(
            title,
            76 + 500 * (number % 2),
            40 + 430 * (number // 2),
            400,
            330,
            (-0.1, 1.1),
            (0.0, 1.25),
            "what the best attacker gets of the secret, 64 public examples",
            "share of FedAvg's gain on B",
            steps(0.0, 1.0, 4, _percent),
            steps(0.0, 1.25, 5, _percent),
        )
        panel.area((-0.1, 0.5), (0.9, 1.25), "less than half the secret, nine tenths of the gain")
        for text, method in shown:
            _place(panel, rows, task, method, text)
        panels.append(panel.draw())
    names = [(text, colour_of(method), method.title) for text, method in shown]
    foot = 895 + 20 * -(-len(names) // 2)
    note = "".join(
        f'<text class="soft" x="40" y="{y}">{text}</text>'
        for y, text in (
            (foot, "Hollow: the owner's own skill dropped (by more than 1 point; for a Llama, by more than a tenth)."),
            (foot + 18, "Bars: range over seeds. Points beyond the axes lie on the edge."),
        )
    )
    return page(1000, foot + 34, "Utility against what leaks", [*panels, legend(names, 40, 875, 2, 480), note])


def _measured(rows: Sequence[Row]) -> list[Method]:
    """Methods that any task has, and of consolidations those with one weight: others lie beside them."""
    known = {row.method for row in rows}
    ended = [method for method in ENDED if method.name.endswith(f"-w{SHOWN_WEIGHT:g}")]
    return [method for method in (*METHODS, *ended) if method.name in known]


def _place(panel: Panel, rows: Sequence[Row], task: str, method: Method, text: str) -> None:
    gain, leak = spread(rows, task, method.name, "gain"), spread_at(rows, task, method.name, 64, added=True)
    if gain is None or leak is None:
        return
    colour, at = colour_of(method), (leak.middle, gain.middle)
    panel.error_bars((leak.low, leak.high), (gain.low, gain.high), at, colour)
    panel.mark(*at, text, colour, hollow=not keeps_a(rows, task, method.name))


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def attacks(results: Results, rows: Sequence[Row]) -> str:
    """What an attacker has of the secret in all, over the number of his public examples."""
    methods = [method for method in METHODS if method.headline]
    sizes = [0, *sorted({*SIZES, *LONG})]
    panels = []
    for number, (task, title) in enumerate(TASKS.items()):
        panel = Panel(
            title,
            76 + 500 * number,
            40,
            400,
            280,
            (0.0, _log(sizes[-1])),
            (0.0, 1.0),
            "public examples",
            "share of the secret skill",
            [(_log(n), str(n)) for n in sizes],
            steps(0.0, 1.0, 4, _percent),
        )
        for method, colour in zip(methods, LINES, strict=False):
            found = [(n, spread_at(rows, task, method.name, n, added=False)) for n in sizes]
            panel.line([(_log(n), one.middle) for n, one in found if one is not None], COLOURS[colour])
        found = [(n, spread_at(rows, task, "local", n, added=False)) for n in sizes]
        panel.line([(_log(n), one.middle) for n, one in found if one is not None], COLOURS["grey"], dashed=True)
        panels.append(panel.draw())
    names = [("", COLOURS[colour], method.title) for method, colour in zip(methods, LINES, strict=False)]
    names.append(("", COLOURS["grey"], "public base only (dashed)"))
    return page(1000, 430, "Attacks over public examples", [*panels, legend(names, 40, 385, 3, 320)])


def _log(n: int) -> float:
    return math.log2(n / 16 + 1)


def blends(results: Results) -> str:
    """The same run restored with other blends: gain on B, and what is left of the owner's gain on A."""
    methods = [method for method in METHODS if method.headline]
    panels = []
    for row, part in enumerate(("b", "a")):
        for number, (task, title) in enumerate(TASKS.items()):
            name = "share of FedAvg's gain on B" if part == "b" else "share of the owner's skill A kept"
            panel = Panel(
                title if row == 0 else "",
                76 + 500 * number,
                40 + 270 * row,
                400,
                190,
                (0.0, 1.0),
                (0.0, 1.25),
                "blend λ",
                name,
                steps(0.0, 1.0, 4, "{:g}".format),
                steps(0.0, 1.25, 5, _percent),
            )
            for method, colour in zip(methods, LINES, strict=False):
                points = _blend_points(results, task, method.name, part)
                panel.line(points, COLOURS[colour])
            panels.append(panel.draw())
    names = [("", COLOURS[colour], method.title) for method, colour in zip(methods, LINES, strict=False)]
    return page(1000, 610, "Blends", [*panels, legend(names, 40, 575, 3, 320)])


def _blend_points(results: Results, task: str, method: str, part: str) -> list[tuple[float, float]]:
    run, world, fedavg = (results.get((task, 0, name)) for name in (method, "world", "fedavg"))
    if run is None or world is None or (part == "b" and fedavg is None):
        return []
    if part == "a":
        start, whole = world["base"]["a"]["loss"], world["owner"]["a"]["loss"]
    else:
        assert fedavg is not None
        start, whole = world["owner"]["b"]["loss"], fedavg["final"]["b"]["loss"]
    found = [(one["blend"], share(start, one[part]["loss"], whole)) for one in run.get("blends", ())]
    return [(blend, value) for blend, value in found if value is not None]
