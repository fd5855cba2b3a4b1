"""What every page is made of. All text is escaped here; what comes from files of somebody else is cleaned too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from fedqsn_cli.text import clean


def document(heading: str, title: str, parts: Iterable[str]) -> str:
    """A whole page: its heading, the title of the window, and ready parts, of which empty ones are left out."""
    css = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    lines = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>{escape(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n<main>",
        f"<h1>{escape(heading)}</h1>",
        *parts,
        "</main>\n</body>\n</html>\n",
    ]
    return "\n".join(line for line in lines if line)


def section(title: str, lead: str, body: str) -> str:
    """A box with a heading and one sentence under it; the title and the sentence are escaped here."""
    return f'<section><h2>{escape(title)}</h2><p class="lead">{safe(lead)}</p>{body}</section>'


def figures(entries: Iterable[tuple[str, str]]) -> str:
    """Large numbers, each with a few words; nothing where there is none."""
    boxes = "".join(f'<div class="figure"><b>{escape(b)}</b><span>{escape(text)}</span></div>' for b, text in entries)
    return f'<div class="figures">{boxes}</div>' if boxes else ""


def legend(entries: Iterable[tuple[str, str]], dashed: Iterable[tuple[str, str]] = ()) -> str:
    """The key of a plot: colours of areas and lines, and of dashed lines, with their names."""
    items = [f'<li><i style="background:{colour}"></i>{escape(name)}</li>' for colour, name in entries]
    items += [f'<li><i class="dashed" style="border-color:{colour}"></i>{escape(name)}</li>' for colour, name in dashed]
    return f'<ul class="key">{"".join(items)}</ul>'


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str]) -> str:
    """Rows under column names; the columns named in `numbers` are aligned to the right."""
    kinds = ["number" if name in numbers else "name" for name in columns]
    head = "".join(f'<th class="{kind}">{safe(name)}</th>' for name, kind in zip(columns, kinds, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{kind}">{safe(cell)}</td>' for cell, kind in zip(row, kinds, strict=True))
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def safe(text: str) -> str:
    """Text that cannot become markup, without control characters."""
    return escape(clean(text))
