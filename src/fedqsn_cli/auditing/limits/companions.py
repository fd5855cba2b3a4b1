"""FQ104: could the files beside the weights carry weights? They are the owner's own, so no comparison finds that.

Three limits. A vocabulary has no more bytes than the model's tokens need. The other files say no more than such files
do: what counts is what is left when they are compressed, so that weights are found in words, numbers, labels and white
space alike. And no text is a long run of characters that are as good as random, as base64 is.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fedqsn_cli.auditing.checks import check, each_proxy
from fedqsn_cli.auditing.findings import Entry, Finding
from fedqsn_cli.auditing.inputs import PROXY, Inputs
from fedqsn_cli.auditing.opened_proxy import OpenedProxy
from fedqsn_cli.auditing.registry import Rule
from fedqsn_cli.checkpoint.companions import MAX_COMPANION_BYTES
from fedqsn_cli.checkpoint.files import read_file

UNUSUAL_COMPANION = Rule(
    "FQ104",
    "unusual-companion",
    "gate",
    what="A tokenizer, template or configuration file says more than such a file needs to, or holds a long text that "
    "is as good as random.",
    why="Every proxy holds these files as they are in the owner's folder; weights in them go out with each.",
    fix="Look at the file. If it must be as it is (some tokenizers hold a table in base64), waive this finding.",
    scope="invariants",
    needs=(PROXY,),
)

_MOST = {  # compressed bytes; several times what well-known models have
    "config.json": 32 << 10,  # a thousand labels
    "tokenizer_config.json": 64 << 10,  # a thousand added tokens
    "added_tokens.json": 64 << 10,
    "special_tokens_map.json": 16 << 10,
    "generation_config.json": 8 << 10,
    "chat_template.jinja": 8 << 10,
    "chat_template.json": 8 << 10,
}
_A_TOKEN, _TABLES = (
    256,
    512 << 10,
)  # bytes of vocabularies: well-known ones have 15 to 150 a token, besides their tables
_BINARY = (".model", ".spm")
_RUN = re.compile(rb"[A-Za-z0-9+/=_-]{200,}")  # of base64 or hexadecimal digits
_RANDOM = 3.5  # bits a character; hexadecimal digits of weights have nearly 4, base64 nearly 6, repeated signs below 2


@check(UNUSUAL_COMPANION, each_proxy, problem="cannot be read")
def companions(inputs: Inputs, proxy: OpenedProxy) -> Iterator[Entry]:
    """Look at every companion of a proxy."""
    found = [finding for path in _paths(proxy) for finding in _problems(proxy, path)]
    yield from UNUSUAL_COMPANION.checked(proxy.scope, "sizes and long texts of all companions were looked at", found)


def _paths(proxy: OpenedProxy) -> list[Path]:
    paths = [proxy.folder / "config.json", *proxy.checkpoint.companions]
    return [path for path in paths if path.is_file()]


def _problems(proxy: OpenedProxy, path: Path) -> Iterator[Finding]:
    data = read_file(path, MAX_COMPANION_BYTES)
    size, most, unit = len(data), _A_TOKEN * _tokens(proxy) + _TABLES, "bytes"
    if path.name in _MOST:
        size, most, unit = len(zlib.compress(data)), _MOST[path.name], "bytes when compressed"
    if size > most:
        message = f"{path.name} has {size} {unit}; such a file needs no more than {most}"
        yield UNUSUAL_COMPANION.finding(proxy.scope, message, value=float(size), limit=float(most))
    elif not path.name.endswith(_BINARY):
        longest = max((len(run) for run in _RUN.findall(data) if entropy(run) > _RANDOM), default=0)
        if longest:
            message = f"{path.name} holds {longest} characters in one piece that are as good as random"
            yield UNUSUAL_COMPANION.finding(proxy.scope, message, value=float(longest), limit=199.0)


def _tokens(proxy: OpenedProxy) -> int:
    """No model has more tokens than its largest tensor has rows."""
    return max((tensor.shape[0] for tensor in proxy.tensors.values() if tensor.shape), default=0)


def entropy(text: bytes) -> float:
    """Bits a character, from how often each occurs."""
    return -sum(count / len(text) * math.log2(count / len(text)) for count in Counter(text).values())
