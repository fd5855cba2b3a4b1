"""How much a file beside the weights may say before it could carry weights: for `export-proxy`, and rule FQ104.

Three limits. A vocabulary has no more bytes than the model's tokens need. The other files say no more than such files
do: what counts is what is left when they are compressed, so that weights are found in words, numbers, labels and white
space alike. And no text is a long run of characters that are as good as random, as base64 is.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

_MOST = {  # compressed bytes; several times what well-known models have
    "config.json": 32 << 10,  # a thousand labels
    "tokenizer_config.json": 64 << 10,  # a thousand added tokens
    "added_tokens.json": 64 << 10,
    "special_tokens_map.json": 16 << 10,
    "generation_config.json": 8 << 10,
    "chat_template.jinja": 8 << 10,
    "chat_template.json": 8 << 10,
}
_A_TOKEN, _TABLES = 256, 512 << 10
"""Bytes of vocabularies: well-known ones have 15 to 150 a token, besides their tables."""
_BINARY = (".model", ".spm")
_LONG = 200
_RUN = re.compile(rb"[A-Za-z0-9+/=_-]{%d,}" % _LONG)  # of base64 or hexadecimal digits
_RANDOM = 3.5  # bits a character; hexadecimal digits of weights have nearly 4, base64 nearly 6, repeated signs below 2


@dataclass(frozen=True, slots=True)
class Excess:
    """What a file has more of than such files need.

    Args:
        message: names the file. value, limit: bytes or characters.
    """

    message: str
    value: int
    limit: int


def excess(name: str, data: bytes, tokens: int) -> Excess | None:
    """What makes a file unusual, if anything does.

    Args:
        data: the whole file. tokens: of the model; see `most_tokens`.
    """
    size, most, unit = len(data), _A_TOKEN * tokens + _TABLES, "bytes"
    if name in _MOST:
        size, most, unit = len(zlib.compress(data)), _MOST[name], "bytes when compressed"
    if size > most:
        return Excess(f"{name} has {size} {unit}; such a file needs no more than {most}", size, most)
    if name.endswith(_BINARY):
        return None
    longest = max((len(run) for run in _RUN.findall(data) if _entropy(run) > _RANDOM), default=0)
    if not longest:
        return None
    message = f"{name} holds {longest} characters in one piece that are as good as random"
    return Excess(message, longest, _LONG - 1)


def most_tokens(shapes: Iterable[tuple[int, ...]]) -> int:
    """No model has more tokens than its largest tensor has rows."""
    return max((shape[0] for shape in shapes if shape), default=0)


def _entropy(text: bytes) -> float:
    """Bits a character, from how often each occurs."""
    return -sum(count / len(text) * math.log2(count / len(text)) for count in Counter(text).values())
