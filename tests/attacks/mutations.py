"""Damage to bytes, to JSON and to the headers of safetensors files, drawn from a seeded generator."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2**31,
    2**53,
    2**63,
    -(2**63),
    2**64,
    10**30,
    1e308,
    5e-324,
    -0.0,
    -0.5,
    "",
    "x",
    "\x00",
    "{client}",
    "../x",
    "\u202e",
    "e\u0301",
    "\ufdfa" * 18,
    "\U0010ffff",
    "0" * 64,
    [],
    {},
    [[]],
    [0] * 3,
    {"a": 1},
)
"""What takes the place of a value: wrong types, numbers out of range, names that mean something to some program."""

RAW = (b"\\ud800", b"1e999", b"9" * 400, b"NaN", b"[" * 3000, b"\xff\xfe", b"\x00", b'"\\u0000"', b"\xf0\x9f", b"-")
PIECES = (b"", b"{", b"}", b",", b'"', b"\n", b"null", *RAW)


def damaged(data: bytes, draw: random.Random) -> bytes:
    """A file with something wrong in it, somewhere."""
    kinds: tuple[Callable[[bytes, random.Random], bytes], ...] = (_bytes, _bytes, _long)
    if data[:1] in (b"{", b"["):
        kinds = (_document, _mixed, _document, _document, _raw, _bytes)
    elif data[8:9] == b"{":
        kinds = (_header, _header, _bytes)
    return draw.choice(kinds)(data, draw)


def _bytes(data: bytes, draw: random.Random) -> bytes:
    """Some bytes flipped, cut out, put in, doubled, or the rest of the file gone."""
    start = draw.randrange(len(data) + 1)
    stop = min(len(data), start + draw.choice((0, 1, 4, 64, 4096)))
    found = data[start:stop]
    return draw.choice(
        (
            data[:start],
            data[:start] + data[stop:],
            data[:start] + draw.choice(PIECES) + data[stop:],
            data[:start] + found + found + data[stop:],
            data[:start] + bytes(byte ^ 1 << draw.randrange(8) for byte in found) + data[stop:],
            data[:start] + draw.randbytes(len(found)) + data[stop:],
        )
    )


def _long(data: bytes, draw: random.Random) -> bytes:
    """A piece of a file many times over, up to some megabytes."""
    start = draw.randrange(len(data) + 1)
    piece = data[start : start + draw.choice((1, 16, 1024))] or b"0"
    return data[:start] + piece * (draw.choice((1 << 12, 1 << 18, 1 << 22)) // len(piece)) + data[start:]


def _mixed(data: bytes, draw: random.Random) -> bytes:
    """JSON in which two values have changed places, or one is the text, the list or the object of itself."""
    try:
        document = json.loads(data)
    except ValueError:
        return _document(data, draw)
    places = list(_places(document))
    if not places:
        return _bytes(data, draw)
    first, second = draw.choice(places), draw.choice(places)
    values = _at(document, first), _at(document, second)
    if draw.random() < 0.5:
        _put(document, first, json.loads(json.dumps(values[1])))
        if first != second[: len(first)]:  # else the second place is gone
            _put(document, second, json.loads(json.dumps(values[0])))
    else:
        _put(document, first, draw.choice((str(values[0]), [values[0]], {"value": values[0]}, [values[0]] * 3)))
    return json.dumps(document).encode()


def _at(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


def _put(document: Any, path: tuple[Any, ...], value: Any) -> None:
    _at(document, path[:-1])[path[-1]] = value


def _raw(data: bytes, draw: random.Random) -> bytes:
    """JSON in which a value is spelled as no value may be."""
    lines = data.split(b"\n")
    places = [number for number, line in enumerate(lines) if b":" in line]
    if not places:
        return _bytes(data, draw)
    place = draw.choice(places)
    lines[place] = lines[place].split(b":")[0] + b":" + draw.choice(RAW) + draw.choice((b"", b","))
    return b"\n".join(lines)


def _document(data: bytes, draw: random.Random) -> bytes:
    """JSON, or JSON lines, of other values, names and fields."""
    lines = data.splitlines()
    try:
        if data[:1] == b"{" and len(lines) > 1 and lines[0].endswith(b"}"):
            place = draw.randrange(len(lines))
            lines[place] = json.dumps(_changed(json.loads(lines[place]), draw)).encode()
            return b"\n".join(lines) + b"\n"
        return json.dumps(_changed(json.loads(data), draw)).encode()
    except ValueError:
        return _bytes(data, draw)


def _changed(document: Any, draw: random.Random) -> Any:
    """One or several changes of a parsed document, in place."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        places = list(_places(document))
        if places:
            _change(document, draw.choice(places), draw)
    return document


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all parts of a document; of long lists those of the first items."""
    if isinstance(value, dict):
        keys: list[Any] = list(value)
    else:
        keys = list(range(min(len(value), 4))) if isinstance(value, list) else []
    for key in keys:
        yield (*path, key)
        yield from _places(value[key], (*path, key))


def _change(document: Any, path: tuple[Any, ...], draw: random.Random) -> None:
    document = _at(document, path[:-1])
    key, kind = path[-1], draw.random()
    if kind < 0.1:
        del document[key]
    elif kind < 0.2 and isinstance(document, dict):
        document[draw.choice(("", "x", "\x00", "../x", "{", str(key) + "#0", "__metadata__"))] = document.pop(key)
    elif kind < 0.3 and isinstance(document[key], int) and not isinstance(document[key], bool):
        document[key] += draw.choice((-1, 1, 64, -document[key] * 2, document[key]))
    elif kind < 0.4 and isinstance(document, dict):
        document[key] = document[draw.choice(list(document))]
    else:
        document[key] = json.loads(json.dumps(draw.choice(VALUES)))


def _header(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file with another header, whose length may be true or not."""
    length = int.from_bytes(data[:8], "little")
    header = draw.choice((_document, _raw, _bytes))(data[8 : 8 + length].rstrip(b" "), draw)
    header += b" " * (-len(header) % 8)
    said = draw.choice((len(header),) * 6 + (0, len(header) - 8, 2**27, 2**63)) % 2**64
    return said.to_bytes(8, "little") + header + data[8 + length :]
