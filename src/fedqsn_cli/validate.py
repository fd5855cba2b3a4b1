"""Small checks of option values, shared by the commands and the functions behind them.

Each takes the value and the name to blame, returns the value, and raises InputError when it cannot be used.
None of them looks at a file. Ratios and client ids are checked in `masking`, where they matter most.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence

from fedqsn_cli.errors import InputError

SMALLEST_BLOCK, LARGEST_BLOCK = 32, 4096  # values per absmax: bitsandbytes' own range

_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]?)(I?)B?", re.IGNORECASE | re.ASCII)


def block_size(value: int, where: str) -> int:
    """Values that share one absmax: a power of two from 32 to 4096."""
    if not SMALLEST_BLOCK <= value <= LARGEST_BLOCK or value & (value - 1):
        hint = f"give a power of two from {SMALLEST_BLOCK} to {LARGEST_BLOCK}, such as 64"
        raise InputError(f"{value} is not a block size", where=where, hint=hint)
    return value


def at_least(least: float, value: float, where: str) -> float:
    """A finite number, `least` or more."""
    if not (math.isfinite(value) and value >= least):
        raise InputError(f"{value:g} is not {least:g} or more", where=where, hint="give a larger number")
    return value


def more_than_zero(value: float, where: str) -> float:
    """A finite number above zero."""
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{value:g} is not a positive number", where=where, hint="give a number above 0")
    return value


def up_to_one(value: float, where: str) -> float:
    """A number from 0 to 1, both allowed."""
    if not 0.0 <= value <= 1.0:
        raise InputError(f"{value:g} is out of range", where=where, hint="give a number from 0 to 1")
    return value


def choice(value: str, choices: Sequence[str], where: str) -> str:
    """One of a few words."""
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        guess = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"{value!r} is not a choice", where=where, hint=f"{guess}choose from {', '.join(choices)}")
    return value


def size_in_bytes(text: str, where: str) -> int:
    """Bytes in a size such as `5GB`, `0.5MB` (decimal) or `512MiB` (binary)."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0 or (match[3] and not match[2]):
        raise InputError(f"{text!r} is not a size", where=where, hint="give a size such as 5GB or 512MiB")
    exponent = " KMGT".index(match[2].upper() or " ")
    return math.ceil(float(match[1]) * float((1024 if match[3] else 1000) ** exponent))


CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def validate_client(client: str) -> str:
    """The id itself, if it is one: a letter or digit, then at most 63 letters, digits, dots, underscores, dashes.

    Raises:
        InputError: it is not.
    """
    if not CLIENT_ID.fullmatch(client):
        raise InputError(f"{client!r} is not a client id", hint="use letters and digits, then also . _ - (64 at most)")
    return client


def validate_ratio(ratio: float) -> float:
    """The ratio itself, if it is one: 0 <= ratio < 1.

    Raises:
        InputError: it is not.
    """
    if not 0 <= ratio < 1:  # NaN neither
        raise InputError(f"{ratio} is not a ratio", hint="give a number from 0 up to, not including, 1")
    return float(ratio) + 0.0  # -0.0 is 0.0
