"""Small drawings as SVG text: panels with axes, marks, lines. They carry their own style and a white ground."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

STYLE = (
    "text{font:12px system-ui,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;fill:#17202e}.soft{fill:#5a6678}"
    ".head{font-size:14px;font-weight:600}.mid{text-anchor:middle}.end{text-anchor:end}.mark{font-size:10px}"
    ".grid{stroke:#e3e8f0}.bar{stroke-width:1.2;opacity:.55}.line{fill:none;stroke-width:2}"
)
COLOURS = {
    "blue": "#2456c8",
    "red": "#b3261e",
    "green": "#17693f",
    "amber": "#a15c00",
    "grey": "#5a6678",
    "violet": "#6b3fa0",
}


@dataclass
class Panel:
    """A plot inside of a drawing: values from `xs` to `ys`, drawn at (left, top) with a size.

    Args:
        x_ticks, y_ticks: values and how they are written.
    """

    title: str
    left: float
    top: float
    width: float
    height: float
    xs: tuple[float, float]
    ys: tuple[float, float]
    x_name: str = ""
    y_name: str = ""
    x_ticks: Sequence[tuple[float, str]] = ()
    y_ticks: Sequence[tuple[float, str]] = ()
    ground: list[str] = field(default_factory=list)  # under the axes
    parts: list[str] = field(default_factory=list)

    def x(self, value: float) -> float:
        low, high = self.xs
        return self.left + (min(max(value, low), high) - low) / (high - low) * self.width

    def y(self, value: float) -> float:
        low, high = self.ys
        return self.top + self.height - (min(max(value, low), high) - low) / (high - low) * self.height

    def area(self, x: tuple[float, float], y: tuple[float, float], name: str) -> None:
        """A shaded part, with its name."""
        left, top = self.x(x[0]), self.y(y[1])
        width, height = self.x(x[1]) - left, self.y(y[0]) - top
        self.ground.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" fill="#e7f3ec"/>'
            f'<text class="mark" x="{left + 5:.1f}" y="{top + 13:.1f}" style="fill:#17693f">{escape(name)}</text>'
        )

    def mark(self, x: float, y: float, text: str, colour: str, *, hollow: bool) -> None:
        """A circle with a short text."""
        fill, ink = ("#fff", colour) if hollow else (colour, "#fff")
        self.parts.append(
            f'<circle cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="8.5" fill="{fill}" stroke="{colour}" '
            f'stroke-width="1.6"/><text class="mark mid" x="{self.x(x):.1f}" y="{self.y(y) + 3.5:.1f}" '
            f'style="fill:{ink}">{escape(text)}</text>'
        )

    def error_bars(self, x: tuple[float, float], y: tuple[float, float], at: tuple[float, float], colour: str) -> None:
        """The ranges of a point, in both directions."""
        for x1, y1, x2, y2 in ((x[0], at[1], x[1], at[1]), (at[0], y[0], at[0], y[1])):
            self.parts.append(
                f'<line class="bar" x1="{self.x(x1):.1f}" y1="{self.y(y1):.1f}" x2="{self.x(x2):.1f}" '
                f'y2="{self.y(y2):.1f}" stroke="{colour}"/>'
            )

    def line(self, points: Sequence[tuple[float, float]], colour: str, *, dashed: bool = False) -> None:
        """A line with dots."""
        if not points:
            return
        path = " ".join(f"{'L' if i else 'M'}{self.x(x):.1f},{self.y(y):.1f}" for i, (x, y) in enumerate(points))
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(f'<path class="line" d="{path}" stroke="{colour}"{dash}/>')
        self.parts += [f'<circle cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="3" fill="{colour}"/>' for x, y in points]

    def draw(self) -> str:
        """The panel with its axes."""
        bottom, right = self.top + self.height, self.left + self.width
        found = [f'<text class="head" x="{self.left}" y="{self.top - 12}">{escape(self.title)}</text>']
        for value, name in self.y_ticks:
            y = self.y(value)
            found.append(f'<line class="grid" x1="{self.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            found.append(f'<text class="soft end" x="{self.left - 6}" y="{y + 4:.1f}">{escape(name)}</text>')
        for value, name in self.x_ticks:
            x = self.x(value)
            found.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{self.top}" y2="{bottom}"/>')
            found.append(f'<text class="soft mid" x="{x:.1f}" y="{bottom + 17}">{escape(name)}</text>')
        centre, middle = self.left + self.width / 2, self.top + self.height / 2
        found.append(f'<text class="soft mid" x="{centre}" y="{bottom + 36}">{escape(self.x_name)}</text>')
        found.append(
            f'<text class="soft mid" transform="translate({self.left - 54},{middle}) rotate(-90)">'
            f"{escape(self.y_name)}</text>"
        )
        return "".join([*self.ground, *found, *self.parts])


def legend(entries: Sequence[tuple[str, str, str]], left: float, top: float, columns: int, width: float) -> str:
    """Names beside their marks, in columns.

    Args:
        entries: text of the mark (empty for a line), colour, name.
    """
    found, deep = [], -(-len(entries) // columns)
    for number, (text, colour, name) in enumerate(entries):
        x, y = left + number // deep * width, top + number % deep * 20
        found.append(f'<circle cx="{x + 8}" cy="{y}" r="{8 if text else 5}" fill="{colour}"/>')
        if text:
            found.append(f'<text class="mark mid" x="{x + 8}" y="{y + 3.5}" style="fill:#fff">{escape(text)}</text>')
        found.append(f'<text x="{x + 22}" y="{y + 4}">{escape(name)}</text>')
    return "".join(found)


def page(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    """The whole drawing."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'role="img" aria-label="{escape(title)}"><style>{STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def steps(low: float, high: float, count: int, written: Callable[[float], str]) -> list[tuple[float, str]]:
    """Evenly spaced ticks."""
    return [(value, written(value)) for i in range(count + 1) for value in [low + (high - low) * i / count]]
