"""JSON as the artifacts of fedqsn use it: no doubled keys, no NaN, no bottomless nesting, no end of values."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from fedqsn_cli.errors import FormatError

Problem = Callable[[str], Any]
"""Takes a reason why a value cannot be used; raises an error, or returns what stands for the value."""

MOST_VALUES = 5_000_000
"""Values of one document, as its commas and brackets tell; each takes up to 100 bytes of memory."""

_MOST_DIGITS = 308  # of a whole number: any such number is less than the largest float
_TOO_LARGE = "not valid JSON (a number is too large)"
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")  # an escape that is half of a pair, or all of nothing


def loads(text: str | bytes, where: object) -> Any:
    """Parse one JSON document strictly.

    Args:
        text: the document; bytes must be UTF-8.
        where: the file, for the error message.

    Raises:
        FormatError: invalid UTF-8 or JSON, a key given twice, NaN, Infinity or a number beyond a float, half of a
            character (a lone surrogate), nesting too deep, too many values.
    """

    def refuse(reason: str) -> NoReturn:
        raise FormatError(reason, where=where)

    if has_too_many_values(text):
        refuse(f"JSON of more than {MOST_VALUES} values")
    document = loads_with(text, where, refuse)
    try:
        if _HALF_CHARACTER.search(text if isinstance(text, str) else text.decode()) is not None:
            json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        refuse("JSON holds half of a character (a lone surrogate), which cannot be printed")
    return document


def has_too_many_values(text: str | bytes) -> bool:
    """Whether a document may hold more values than are read at once."""
    signs: Sequence[Any] = (b",", b"[", b"{") if isinstance(text, bytes) else ",[{"
    return sum(text.count(sign) for sign in signs) > MOST_VALUES


def loads_with(text: str | bytes, where: object, problem: Problem) -> Any:
    """Parse one JSON document in which single values may be unusable: no finite numbers, or of keys given twice.

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

    def finite(digits: str) -> Any:
        return number if math.isfinite(number := float(digits)) else problem(_TOO_LARGE)

    def whole(digits: str) -> Any:
        return int(digits) if len(digits) <= _MOST_DIGITS else problem(_TOO_LARGE)

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant, parse_float=finite, parse_int=whole)
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
