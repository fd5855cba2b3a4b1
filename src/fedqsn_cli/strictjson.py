"""JSON as the artifacts of fedqsn use it: no doubled keys, no NaN, no bottomless nesting."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NoReturn

from fedqsn_cli.errors import FormatError

Problem = Callable[[str], Any]
"""Takes a reason why a value cannot be used; raises an error, or returns what stands for the value."""


def loads(text: str | bytes, where: object) -> Any:
    """Parse one JSON document strictly.

    Args:
        text: the document; bytes must be UTF-8.
        where: the file, for the error message.

    Raises:
        FormatError: invalid UTF-8 or JSON, a key given twice, NaN or Infinity, nesting too deep.
    """

    def refuse(reason: str) -> NoReturn:
        raise FormatError(reason, where=where)

    return loads_with(text, where, refuse)


def loads_with(text: str | bytes, where: object, problem: Problem) -> Any:
    """Parse one JSON document in which single values may be unusable: NaN, Infinity, and those of keys given twice.

    Args:
        text, where: as for `loads`.
        problem: is asked for each such value.

    Raises:
        FormatError: invalid UTF-8 or JSON, nesting too deep.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in items:
            seen[key] = problem(f"JSON key {key!r} is given twice") if key in seen else value
        return seen

    def constant(name: str) -> Any:
        return problem(f"JSON holds {name}, which is not a number")

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise FormatError(f"not UTF-8 text (byte {error.start})", where=where) from None
    except RecursionError:
        raise FormatError("JSON is nested too deeply", where=where) from None
    except ValueError as error:
        raise FormatError(f"not valid JSON ({error})", where=where) from None


def dumps(document: object) -> str:
    """Canonical JSON: sorted keys, no white space, ASCII only, NaN refused. Equal values give equal text."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def pretty(document: object) -> str:
    """Indented JSON with a final line feed, sorted keys: for files that people read."""
    return json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
