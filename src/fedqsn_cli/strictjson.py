"""JSON as the artifacts of fedqsn use it: no doubled keys, no NaN, no bottomless nesting."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from fedqsn_cli.errors import FormatError


def loads(text: str | bytes, where: object) -> Any:
    """Parse one JSON document strictly.

    Args:
        text: the document; bytes must be UTF-8.
        where: the file, for the error message.

    Raises:
        FormatError: invalid UTF-8 or JSON, a key given twice, NaN or Infinity, nesting too deep.
    """

    def no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise FormatError(f"JSON key {key!r} is given twice", where=where)
            seen[key] = value
        return seen

    def no_constants(name: str) -> NoReturn:
        raise FormatError(f"JSON holds {name}, which is not a number", where=where)

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return json.loads(text, object_pairs_hook=no_doubles, parse_constant=no_constants)
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
