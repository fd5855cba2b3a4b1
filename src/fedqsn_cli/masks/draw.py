"""Which units are hidden: nothing but HMAC-SHA256 and SHAKE-256 of the job's key decides.

::

    seed  = HMAC-SHA256(key, "fedqsn/v1" ‖ scope ‖ group), every field preceded by its length (8 bytes, big-endian)
    ranks = SHAKE-256(seed), one little-endian 64-bit number a unit
    the k units of lowest rank are hidden, ties by lowest index
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli import validate
from fedqsn_cli.errors import InputError

LABEL = "fedqsn/v1"
KEY_BYTES = 32
SERVER: tuple[str, ...] = ("server",)

STREAM_FROM = 2**20
"""Groups of at least so many units are drawn as a stream, so that their ranks are never all in memory."""

Mask = NDArray[np.bool_]  # (units,) True where hidden


def client_scope(client: str, round: int | None) -> tuple[str, ...]:
    """Scope of a client's mask: of one round (schedule fresh), or of all rounds when round is None (sticky)."""
    validate.client(client)
    if round is None:
        return ("client", client)
    if round < 0:
        raise InputError(f"round {round} is negative")
    return ("client", client, str(round))


def derive(key: bytes, fields: Iterable[str]) -> bytes:
    """HMAC-SHA256 of fields, each preceded by its length, so that no two lists of fields collide (32 bytes)."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"a key has {KEY_BYTES} bytes")
    message = hmac.new(key, digestmod=hashlib.sha256)
    for field in fields:
        message.update(field_bytes(field))
    return message.digest()


def field_bytes(field: str) -> bytes:
    """A field of a message as HMAC reads it: its length in bytes (8 bytes, big-endian), then its UTF-8 text."""
    data = field.encode("utf-8")
    return len(data).to_bytes(8, "big") + data


def seed(key: bytes, scope: tuple[str, ...], group: str) -> bytes:
    """What SHAKE-256 expands into a group's ranks (32 bytes)."""
    return derive(key, (LABEL, *scope, group))


def ranks(key: bytes, scope: tuple[str, ...], group: str, n: int) -> NDArray[np.uint64]:
    """One pseudorandom 64-bit rank for each of a group's n units, shape (n,)."""
    stream = hashlib.shake_256(seed(key, scope, group)).digest(8 * n)
    return np.frombuffer(stream, dtype="<u8").astype(np.uint64, copy=False)


def hidden_units(key: bytes, group: str, n: int, p1: float) -> Mask:
    """The server mask H of a group: `hidden_count(n, p1)` of its n units, shape (n,), True where hidden."""
    return _draw(key, SERVER, group, np.ones(n, np.bool_), p1)


def client_units(key: bytes, group: str, hidden: Mask, p2: float, scope: tuple[str, ...]) -> Mask:
    """The client mask C of a group: min(round(p2·v), v - 1) of the v units that `hidden` leaves, shape (n,)."""
    return _draw(key, scope, group, ~hidden, p2)


class ClientUnitsInOrder:
    """The units of `client_units`, drawn once more from the first to the last: they are never all in memory.

    Args:
        hidden: what the server hides of the group, shape (n,).
    """

    def __init__(self, key: bytes, group: str, hidden: Mask, p2: float, scope: tuple[str, ...]) -> None:
        from fedqsn_cli.masks.shake256 import LastChosen, RankStream, lowest_ranks

        allowed = ~hidden
        count = hidden_count(int(np.count_nonzero(allowed)), p2)
        own = seed(key, scope, group)
        found = lowest_ranks(own, allowed, count) if count else (allowed, LastChosen(0, -1))
        self._whole = client_units(key, group, hidden, p2, scope) if found is None else None
        self._hidden, self._stream, self._at = hidden, RankStream(own), 0
        self._last = found[1] if found is not None else LastChosen(0, -1)

    def take(self, count: int) -> Mask:
        """The next units, True where hidden from the client only."""
        run = slice(self._at, self._at + count)
        self._at += count
        if self._whole is not None:  # once in more draws than anyone makes
            return self._whole[run]
        return self._stream.chosen(count, self._last) & ~self._hidden[run]

    def visible(self, count: int) -> Mask:
        """The next units, True where the client sees them."""
        hidden = self._hidden[self._at : self._at + count]
        seen: Mask = ~(hidden | self.take(count))
        return seen


def _draw(key: bytes, scope: tuple[str, ...], group: str, allowed: Mask, ratio: float) -> Mask:
    """The share `ratio` of the allowed units, those of lowest rank; ranks do not depend on what is allowed."""
    count = hidden_count(int(np.count_nonzero(allowed)), ratio)
    if count == 0:
        return np.zeros(allowed.size, np.bool_)
    if count == allowed.size:
        return np.ones(allowed.size, np.bool_)
    if allowed.size >= STREAM_FROM:
        from fedqsn_cli.masks.shake256 import lowest_ranks

        found = lowest_ranks(seed(key, scope, group), allowed, count)
        if found is not None:
            return found[0]
    drawn = ranks(key, scope, group, allowed.size)
    mask = np.zeros(allowed.size, np.bool_)
    mask[allowed] = _lowest(drawn[allowed], count)
    return mask


def hidden_count(n: int, ratio: float) -> int:
    """How many of n units a ratio hides: min(round(ratio·n), n - 1), at least one stays visible; all of them for 1."""
    return n if ratio == 1 else max(0, min(round(validate.ratio(ratio) * n), n - 1))


def rescale_factor(n: int, hidden: int, client: int) -> np.float32:
    """n / |V|: what the visible part is multiplied by to make up for the holes (inverted dropout)."""
    return np.float32(n / (n - hidden - client))


def _lowest(drawn: NDArray[np.uint64], count: int) -> Mask:
    """True for the `count` lowest ranks (0 < count <= size), ties by lowest index, shape of drawn."""
    last = np.partition(drawn, count - 1)[count - 1]
    mask: Mask = drawn < last
    ties = np.flatnonzero(drawn == last)
    mask[ties[: count - int(np.count_nonzero(mask))]] = True
    return mask
