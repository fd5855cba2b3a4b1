"""Plots as inline SVG, drawn with nothing but text: lines, bars and a heat map that stay sharp on paper.

Coordinates are those of a small view box, so that a plot can be read on a phone as well as on a desk. Every name is
escaped here; every number is formatted here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from markupsafe import Markup

WIDTH, HEIGHT = 440, 264
LEFT, RIGHT, TOP, BOTTOM = 44, 24, 10, 40

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a plot: css class (series, worst, expected ...), points, and the name at its end."""

    kind: str
    points: Points
    name: str = ""


@dataclass(frozen=True, slots=True)
class Level:
    """A horizontal line over the whole width, such as a limit; the key beside the plot names it."""

    kind: str
    y: float


@dataclass(frozen=True)
class Plot:
    """Lines over x; y is a share from 0 to 1, or a number between `low` and `high` that `number` writes."""

    title: str
    x_name: str
    lines: Sequence[Line]
    levels: Sequence[Level] = ()
    band: tuple[Points, Points] | None = None  # lower and upper edge
    ticks: Sequence[tuple[float, str]] = field(default_factory=tuple)
    low: float = 0.0
    high: float = 1.0
    number: Callable[[float], str] | None = None


@dataclass(frozen=True)
class Picture:
    """A chart as pages show it.

    Args:
        title, lead: of its section; one sentence that says what to see.
        key, dashed: (colour, name) of areas and lines, and of dashed lines.
        scrolls: is it as wide as it is, whatever the page?
    """

    title: str
    lead: str
    svg: Markup
    key: Sequence[tuple[str, str]] = ()
    dashed: Sequence[tuple[str, str]] = ()
    scrolls: bool = False


def draw(plot: Plot) -> Markup:
    """The plot as one <svg> element."""
    xs = [x for line in plot.lines for x, _ in line.points] or [0.0, 1.0]
    frame = _Frame(min(xs), max(xs), plot.low, plot.high)
    parts = [_grid(frame, plot)]
    if plot.band is not None:
        lower, upper = plot.band
        parts.append(f'<path class="band" d="{frame.path([*upper, *reversed(lower)])}Z"/>')
    parts += [
        f'<path class="line {line.kind}" d="{frame.path(line.points)}"/>' for line in plot.lines if len(line.points) > 1
    ]
    dotted = [line for line in plot.lines if line.kind != "expected" and len(line.points) <= 30]
    parts += [_dots(frame, line, plot.number) for line in dotted]
    parts += _levels(frame, plot.levels)
    return _svg(WIDTH, HEIGHT, plot.title, parts)


@dataclass(frozen=True, slots=True)
class _Frame:
    """From values to coordinates."""

    x0: float
    x1: float
    low: float
    high: float

    def x(self, value: float) -> float:
        span = self.x1 - self.x0
        share = (value - self.x0) / span if span else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def path(self, points: Points) -> str:
        return " ".join(f"{'L' if i else 'M'}{self.x(x):.1f},{self.y(y):.1f}" for i, (x, y) in enumerate(points))


def _grid(frame: _Frame, plot: Plot) -> str:
    steps = [plot.low + (plot.high - plot.low) * i / 4 for i in range(5)]
    written = plot.number or (lambda y: f"{round(100 * y)}%")
    rows = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{frame.y(y):.1f}" y2="{frame.y(y):.1f}"/>'
        f'<text class="tick end" x="{LEFT - 6}" y="{frame.y(y) + 4:.1f}">{written(y)}</text>'
        for y in steps
    ]
    ticks = plot.ticks or [(x, f"{x:g}") for x in whole_ticks(frame.x0, frame.x1)]
    marks = [
        f'<text class="tick mid" x="{frame.x(x):.1f}" y="{HEIGHT - BOTTOM + 17}">{escape(name)}</text>'
        for x, name in ticks
    ]
    name = f'<text class="axis mid" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}">{escape(plot.x_name)}</text>'
    return "".join([*rows, *marks, name])


def whole_ticks(low: float, high: float) -> list[float]:
    """At most eight whole numbers from low to high."""
    step = max(1, math.ceil((high - low) / 7))
    return [low + step * i for i in range(int((high - low) // step) + 1)]


def _dots(frame: _Frame, line: Line, number: Callable[[float], str] | None) -> str:
    written = number or (lambda y: f"{100 * y:.1f}%")
    return "".join(
        f'<circle class="dot {line.kind}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.6">'
        f"<title>{escape(line.name)} {written(y)}</title></circle>"
        for x, y in line.points
    )


def _levels(frame: _Frame, levels: Sequence[Level]) -> list[str]:
    return [
        f'<line class="level {level.kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{frame.y(level.y):.1f}" '
        f'y2="{frame.y(level.y):.1f}"/>'
        for level in levels
    ]


@dataclass(frozen=True, slots=True)
class Bar:
    """A horizontal bar: (css class, share) segments from 0, drawn over each other, widest first; a note at the end."""

    name: str
    segments: Sequence[tuple[str, float]]
    note: str


def bars(title: str, rows: Sequence[Bar], name_width: int = 130) -> Markup:
    """Horizontal bars under each other; shares from 0 to 1."""
    step, note = 24, max(50, 8 + 7 * max((len(row.note) for row in rows), default=0))
    length = WIDTH - name_width - note
    parts = []
    for i, row in enumerate(rows):
        y = 6 + step * i
        parts.append(
            f'<text class="name end" x="{name_width - 8}" y="{y + 13}">{escape(shortened(row.name, 20))}</text>'
        )
        parts.append(f'<rect class="track" x="{name_width}" y="{y}" width="{length}" height="17" rx="3"/>')
        parts += [
            f'<rect class="bar {kind}" x="{name_width}" y="{y}" height="17" rx="3" '
            f'width="{length * min(max(share, 0), 1):.1f}">'
            f"<title>{escape(row.name)}: {100 * share:.1f}%</title></rect>"
            for kind, share in row.segments
        ]
        parts.append(f'<text class="note" x="{name_width + length + 6}" y="{y + 13}">{escape(row.note)}</text>')
    return _svg(WIDTH, 12 + step * len(rows), title, parts)


def heat(title: str, rows: Sequence[str], columns: Sequence[str], shares: Sequence[Sequence[float | None]]) -> Markup:
    """A map of shares, 0 white to 1 dark; its size is fixed: a narrow screen scrolls, it does not shrink it."""
    cell = 26 if len(columns) <= 24 else 22 if len(columns) <= 40 else 17
    left = 12 + 7 * max((len(shortened(name, 16)) for name in rows), default=0)
    head = 16 + round(5.4 * max((len(shortened(name, 22)) for name in columns), default=0))
    parts = []
    for i, name in enumerate(columns):
        x = left + cell * i + cell / 2
        parts.append(
            f'<text class="column" transform="translate({x + 4:.0f},{head - 6}) rotate(-60)">'
            f"{escape(shortened(name, 22))}</text>"
        )
    for j, name in enumerate(rows):
        y = head + cell * j
        parts.append(
            f'<text class="name end" x="{left - 8}" y="{y + cell / 2 + 4:.0f}">{escape(shortened(name, 16))}</text>'
        )
        parts += [_cell(left + cell * i, y, cell, name, columns[i], share) for i, share in enumerate(shares[j])]
    width = left + cell * len(columns) + round(0.6 * head) + 8
    return _svg(width, head + cell * len(rows) + 4, title, parts, fixed=True)


def _cell(x: float, y: float, size: int, row: str, column: str, share: float | None) -> str:
    if share is None:
        return ""
    text = ""
    if size >= 26:
        tone = "light" if share > 0.55 else "dark"
        text = (
            f'<text class="cell {tone} mid" x="{x + size / 2 - 0.5}" y="{y + size / 2 + 3}">{round(100 * share)}</text>'
        )
    tip = f"<title>{escape(row)}, {escape(column)}: {100 * share:.1f}% seen</title>"
    return (
        f'<g><rect x="{x}" y="{y}" width="{size - 1}" height="{size - 1}" rx="2" fill="{shade(share)}"/>{text}{tip}</g>'
    )


def shade(share: float) -> str:
    """A colour between near-white and dark blue."""
    low, high = (238, 243, 252), (24, 62, 145)
    share = min(max(share, 0.0), 1.0) ** 1.5
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(low, high, strict=True))


def shortened(name: str, most: int) -> str:
    """A long name without its middle."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most - most // 2) :]}"


def _svg(width: float, height: float, title: str, parts: Sequence[str], fixed: bool = False) -> Markup:
    size = f' width="{width:.0f}" height="{height:.0f}"' if fixed else ""
    head = f'<svg viewBox="0 0 {width:.0f} {height:.0f}"{size} role="img" aria-label="{escape(title)}">'
    return Markup(f"{head}{''.join(parts)}</svg>")  # every name in it was escaped above
