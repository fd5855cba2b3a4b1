"""The help of a command as plain text: usage, what it does, its options by group, examples.

Kept apart from typer's rich panels: those take longer to import than all of fedqsn, and fold differently in every
terminal, while this text is copied word for word into docs/commands/.
"""

from __future__ import annotations

import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Container, Mapping, Sequence
from typing import Any

import typer

from fedqsn_cli import console

_NAME_COLUMN = 28
_SMALLEST_WIDTH, _LARGEST_WIDTH = 60, 100
_FIRST = ("Arguments",)
_LAST = ("Output", "Help")


def of_command(command: Any, context: typer.Context) -> str:
    """The help text of one command."""
    params = command.get_params(context)
    names = {param: _names(param, command.former) for param in params}
    parts = [_usage(context, names), _prose(command.help or "")]
    for title, members in _panels(params).items():
        rows = [(names[param], _describe(param)) for param in members]
        parts.append(_section(title, rows))
    return "\n\n".join(parts)


def of_group(group: Any, context: typer.Context, functions: Mapping[str, Any]) -> str:
    """The help text of `fedqsn` itself: its commands, a line each."""
    options = [(_names(param), _describe(param)) for param in group.get_params(context)]
    usage = f"{_heading('Usage:')} {context.command_path} COMMAND [OPTIONS]"
    return "\n\n".join([usage, _prose(group.help or ""), _commands(functions), _section("Options", options)])


def of_family(path: str, functions: Mapping[str, Any]) -> str:
    """The help text of commands that share their first word, such as those of `fedqsn courier`."""
    return "\n\n".join([f"{_heading('Usage:')} {path} COMMAND [OPTIONS]", _commands(functions)])


def _commands(functions: Mapping[str, Any]) -> str:
    return _section("Commands", [(name, _first_sentence(function.__doc__)) for name, function in functions.items()])


def _usage(context: typer.Context, names: Mapping[Any, str]) -> str:
    """The usage line with everything that must be given."""
    arguments = [_placeholder(param) for param in names if param.param_type_name == "argument"]
    options = [name for param, name in names.items() if param.param_type_name == "option" and param.required]
    line = " ".join([context.command_path, *arguments, *options, "[OPTIONS]"])
    wrapped = textwrap.wrap(line, _width() - 7, subsequent_indent=" " * 7, break_on_hyphens=False)
    return f"{_heading('Usage:')} " + "\n".join(wrapped)


def _panels(params: Sequence[Any]) -> dict[str, list[Any]]:
    panels: dict[str, list[Any]] = {}
    for param in params:
        is_argument = param.param_type_name == "argument"
        title = param.rich_help_panel or ("Arguments" if is_argument else "Help")
        panels.setdefault(title, []).append(param)
    middle = [title for title in panels if title not in _FIRST + _LAST]
    return {title: panels[title] for title in (*_FIRST, *middle, *_LAST) if title in panels}


def _placeholder(param: Any) -> str:
    name = str(param.display_name_raw)
    name += "..." if param.nargs == -1 and not name.endswith("...") else ""
    return name if param.required else f"[{name}]"


def _names(param: Any, former: Container[str] = ()) -> str:
    """`-q, --quiet`, `--rescale / --no-rescale`, `--p1 RATIO`; no name that an option had formerly."""
    if param.param_type_name == "argument":
        return str(param.display_name_raw)
    names = ", ".join(sorted((name for name in param.opts if name not in former), key=len))
    if param.secondary_opts:
        names += f" / {param.secondary_opts[0]}"
    if param.is_flag:
        return names
    return f"{names} {param.metavar or _kind(param)}"


def _kind(param: Any) -> str:
    choices = param.type_descriptor.choices
    return "|".join(choices) if choices else "VALUE"


def _describe(param: Any) -> str:
    """Help text with the default, or the word required, in brackets."""
    text = str(param.help or "")
    if param.envvar:
        text = f"{text} [env: {param.envvar}]"
    if param.required:
        return f"{text} [required]"
    if isinstance(param.show_default, str):
        return f"{text} [default: {param.show_default}]"
    default = param.default
    if (
        not param.show_default
        or default is None
        or (param.param_type_name == "option" and param.is_flag and not default)
    ):
        return text
    shown = param.opts[0] if getattr(param, "is_flag", False) else default
    return f"{text} [default: {f'{shown:g}' if isinstance(shown, float) else shown}]"


def _section(title: str, rows: Sequence[tuple[str, str]]) -> str:
    lines = [_heading(f"{title}:")]
    for name, text in rows:
        wrapped = _fold(text, _width() - _NAME_COLUMN - 2)
        if len(name) + 4 > _NAME_COLUMN:
            lines.append(f"  {name}")
        else:
            lines.append(f"  {name:<{_NAME_COLUMN - 2}}{wrapped.pop(0) if wrapped else ''}".rstrip())
        lines += [" " * _NAME_COLUMN + line for line in wrapped]
    return "\n".join(lines)


def _prose(text: str) -> str:
    """Paragraphs folded to the width; indented ones (examples) as they are; `Examples:` set off."""
    parts = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith(" "):
            parts.append(paragraph)
        elif paragraph.endswith(":") and "\n" not in paragraph:
            parts.append(_heading(paragraph))
        else:
            parts.append("\n".join(_fold(" ".join(paragraph.split()), _width())))
    return "\n\n".join(parts).replace(f"{_heading('Examples:')}\n\n", f"{_heading('Examples:')}\n")


def _fold(text: str, width: int) -> list[str]:
    """Lines of at most this width; what is in brackets or quotes stays on one line."""
    glued = re.sub(r"\[[^]]*\]|(?<!\w)'[^']*'(?!\w)", lambda match: match[0].replace(" ", "\0"), text)
    return [line.replace("\0", " ") for line in textwrap.wrap(glued, width, break_on_hyphens=False)]


def _first_sentence(text: str | None) -> str:
    return " ".join((text or "").split("\n\n")[0].split()).rstrip(".")


def _width() -> int:
    return max(_SMALLEST_WIDTH, min(shutil.get_terminal_size((_LARGEST_WIDTH, 24)).columns, _LARGEST_WIDTH))


def _heading(text: str) -> str:
    """Bold on a terminal that wants it."""
    return f"\033[1m{text}\033[0m" if console.wants_style(sys.stdout) else text
