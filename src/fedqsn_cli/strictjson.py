"""JSON as the artifacts of fedqsn use it: no doubled keys, no NaN, no bottomless nesting, no end of values."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from fedqsn_cli.errors import FormatError

MOST_VALUES = 5_000_000
"""Values of one document, as its commas and brackets tell; each takes up to 100 bytes of memory."""

_MOST_DIGITS = 308  # of a whole number: any such number is less than the largest float
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
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        if sum(map(text.count, ",[{")) > MOST_VALUES:
            raise FormatError(f"JSON of more than {MOST_VALUES} values", where=where)
        document = _parsed(text, where)
        if _HALF_CHARACTER.search(text) is not None:
            json.dumps(document, ensure_ascii=False).encode()
        return document
    except UnicodeDecodeError as error:
        raise FormatError(f"not UTF-8 text (byte {error.start})", where=where) from None
    except UnicodeEncodeError:
        raise FormatError(
            "JSON holds half of a character (a lone surrogate), which cannot be printed", where=where
        ) from None
    except RecursionError:
        raise FormatError("JSON is nested too deeply", where=where) from None
    except ValueError as error:
        raise FormatError(f"not valid JSON ({error})", where=where) from None


def _parsed(text: str, where: object) -> Any:
    def no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise FormatError(f"JSON key {key!r} is given twice", where=where)
            seen[key] = value
        return seen

    def no_constants(name: str) -> NoReturn:
        raise FormatError(f"JSON holds {name}, which is not a number", where=where)

    def finite(digits: str) -> float:
        if not math.isfinite(number := float(digits)):
            raise ValueError("a number is too large")
        return number

    def whole(digits: str) -> int:
        if len(digits) > _MOST_DIGITS:
            raise ValueError("a number is too large")
        return int(digits)

    return json.loads(
        text, object_pairs_hook=no_doubles, parse_constant=no_constants, parse_float=finite, parse_int=whole
    )


def dumps(document: object) -> str:
    """Canonical JSON: sorted keys, no white space, ASCII only, NaN refused. Equal values give equal text."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def pretty(document: object) -> str:
    """Indented JSON with a final line feed, sorted keys: for files that people read."""
    return json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
