"""Pages from templates. Whatever a template is given is text: markup in it is escaped, control characters are shown."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from fedqsn_cli.text import clean

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: Path, **values: object) -> str:
    """A whole page.

    Args:
        template: extends frame.html.j2. values: what it shows; only `Markup`, such as a chart, is taken as it is.
    """
    return _environment(template.parent).get_template(template.name).render(values)


@cache
def _environment(folder: Path) -> Environment:
    """Templates of a folder, and the parts of all pages."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent], encoding="utf-8"),
        autoescape=True,
        finalize=_cleaned,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _cleaned(value: object) -> object:
    return clean(value) if type(value) is str else value  # Markup is another type
