"""Small checks of option values, shared by the commands and the functions behind them.

Each takes the value and the option that an error names, returns the value, and raises InputError when it is invalid.
None of them looks at a file.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from fedqsn_cli.errors import InputError

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # values per absmax: bitsandbytes' own range

CLIENT_ID = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
CLIENT = "{client}"
"""In an option, it stands for the name of each client."""

_HOST = r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}"
_NO_SITES = ("server", "admin")  # FLARE's own

_INTERVAL = re.compile(r"(\d{1,15}(?:\.\d{1,15})?) *([smh]?)", re.IGNORECASE | re.ASCII)
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?) *([KMGT]?)(I?)B?", re.IGNORECASE | re.ASCII)


def not_empty(value: str, where: str) -> str:
    """Text, and not the empty string (an unset variable in a script, most often)."""
    if not value:
        raise InputError("is empty", where=where, hint="is a variable in your script unset?")
    if any("\ud800" <= character <= "\udfff" for character in value):  # how Python passes on bytes that are not UTF-8
        raise InputError(f"{value!r} is not UTF-8 text", where=where, hint="rename it")
    if "\0" in value:
        raise InputError(f"{value!r} holds a null character, which no file name can", where=where)
    return value


def client(value: str, where: str | None = None) -> str:
    """A client id: a letter or digit, then at most 63 letters, digits, dots, underscores, dashes."""
    return _name("client id", value, where)


def clients(value: str | Sequence[str], where: str) -> tuple[str, ...]:
    """Different client ids, at least one."""
    names = tuple(client(name, where) for name in ([value] if isinstance(value, str) else value))
    if not names:
        raise InputError("no client was named", where=where)
    if len(set(names)) != len(names):
        raise InputError("a client is named twice", where=where)
    return names


def site(value: str, where: str | None = None) -> str:
    """A client id that its site can have in FLARE, where dots separate the names of parent and child."""
    client(value, where)
    if "." in value:
        raise InputError(f"{value!r} cannot be the name of a site", where=where, hint="use letters, digits, _ and -")
    if value.lower() in _NO_SITES:
        raise InputError(f"{value!r} cannot be the name of a site", where=where, hint="choose another name")
    return value


def sites(value: str | Sequence[str], where: str) -> tuple[str, ...]:
    """Different names of sites, at least one."""
    return tuple(site(name, where) for name in clients(value, where))


def not_the_host(names: Sequence[str], host: str, where: str) -> None:
    """Refuse sites that are called as the server's machine is: their certificates would be its own."""
    if host.lower() in [name.lower() for name in names]:
        raise InputError(f"{host!r} is the name of the server", where=where, hint="choose another name for the site")


def for_each_client(value: str, where: str, several: bool) -> str:
    """Text in which {client}, and no other placeholder, stands for a client's name."""
    unknown = next(iter(re.findall(r"\{[^{}]*\}?|\}", value.replace(CLIENT, ""))), None)
    if unknown is not None:
        raise InputError(f"{unknown!r} is no placeholder", where=where, hint=f"the only one is {CLIENT}")
    if several and CLIENT not in value:
        raise InputError("is the same for several clients", where=where, hint=f'put "{CLIENT}" into it')
    return value


def none_given(*options: tuple[str, bool, str, str]) -> None:
    """Refuse the first option that is given where it cannot be.

    Args:
        options: the flag of each, whether it is given, what is wrong then, and a hint.

    Raises:
        InputError: one is given.
    """
    for flag, given, what, hint in options:
        if given:
            raise InputError(what, where=flag, hint=hint)


def here(value: str | Path, where: str) -> str | Path:
    """A path on this machine."""
    not_empty(str(value), where)
    if str(value).startswith("hf:/"):  # a Path has one slash of two
        raise InputError(f"{value} is not a path on this machine", where=where, hint="give a file or folder")
    return value


def project(value: str, where: str | None = None) -> str:
    """The name of a courier's project; as a client id, since folders are named after both."""
    return _name("project name", value, where)


def host(value: str, where: str | None = None) -> str:
    """The name or address of a machine."""
    if not re.fullmatch(_HOST, value):
        raise InputError(f"{value!r} is not the name of a host", where=where, hint="give one such as fl.example.org")
    return value


def _name(kind: str, value: str, where: str | None) -> str:
    if not re.fullmatch(CLIENT_ID, value):
        hint = "use letters and digits, then also . _ - (64 at most)"
        raise InputError(f"{value!r} is not a {kind}", where=where, hint=hint)
    return value


def ratio(value: float, where: str | None = None) -> float:
    """A share of units: 0 <= ratio < 1."""
    if not 0 <= value < 1:  # NaN neither
        hint = "give a number from 0 up to, not including, 1"
        raise InputError(f"{value} is not a ratio", where=where, hint=hint)
    return float(value) + 0.0  # -0.0 is 0.0


def block_size(value: int, where: str) -> int:
    """Values that share one absmax: a power of two from 32 to 4096."""
    if value not in BLOCK_SIZES:
        hint = f"give a power of two from {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]}, such as 64"
        raise InputError(f"{value} is not a block size", where=where, hint=hint)
    return value


def at_least(least: float, value: float, where: str) -> float:
    """A finite number, `least` or more."""
    if not (math.isfinite(value) and value >= least):
        raise InputError(f"{value:g} is not {least:g} or more", where=where, hint="give a larger number")
    return value


def at_least_one(value: int, where: str) -> int:
    """A count, 1 or more."""
    at_least(1, value, where)
    return value


def not_negative(value: float, where: str) -> float:
    """A finite number, 0 allowed."""
    return at_least(0, value, where)


def more_than_zero(value: float, where: str) -> float:
    """A finite number above zero."""
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{value:g} is not a positive number", where=where, hint="give a number above 0")
    return value


def up_to_one(value: float, where: str) -> float:
    """A number from 0 to 1, both allowed."""
    if not 0.0 <= value <= 1.0:  # NaN neither
        shown = str(value) if isinstance(value, int) else f"{value:g}"  # an int may be too large for a float
        raise InputError(f"{shown} is out of range", where=where, hint="give a number from 0 to 1")
    return float(value) + 0.0  # -0.0 is 0.0


def interval(text: str, where: str) -> tuple[int | None, float | None]:
    """Steps in an interval such as `200`, or seconds in one such as `10m` or `1.5h`; the other one is None."""
    match = _INTERVAL.fullmatch(text.strip())
    if match is None or float(match[1]) == 0 or (not match[2] and "." in match[1]):
        hint = "give steps such as 200, or a time such as 10m"
        raise InputError(f"{text!r} is neither a number of steps nor a time", where=where, hint=hint)
    if not match[2]:
        return int(match[1]), None
    return None, float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2].lower()]


def choice(value: str, choices: Sequence[str], where: str) -> str:
    """One of the given words."""
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        guess = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"{value!r} is not a choice", where=where, hint=f"{guess}choose from {', '.join(choices)}")
    return value


def size(text: str, where: str) -> str:
    """A size such as `5GB`."""
    size_in_bytes(text, where)
    return text


def size_in_bytes(text: str, where: str) -> int:
    """Bytes in a size such as `5GB`, `0.5MB` (decimal) or `512MiB` (binary)."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0 or (match[3] and not match[2]):
        raise InputError(f"{text!r} is not a size", where=where, hint="give a size such as 5GB or 512MiB")
    exponent = " KMGT".index(match[2].upper() or " ")
    return math.ceil(float(match[1]) * float((1024 if match[3] else 1000) ** exponent))


def named(parse: Callable[[str], object], text: str, where: str) -> str:
    """A text that a parser accepts; errors of the parser name the option."""
    try:
        parse(text)
    except InputError as error:
        raise InputError(error.what, where=where, hint=error.hint) from None
    return text
