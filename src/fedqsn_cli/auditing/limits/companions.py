"""FQ104: could the files beside the weights carry weights? They are the owner's own, so no comparison finds that.

A file may not be larger than any of its kind that is known, and no text in it may be a long run of characters that are
as good as random: base64 of weights is, words and code are not.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fedqsn_cli.auditing.checks import check, each_proxy
from fedqsn_cli.auditing.findings import Entry, Finding
from fedqsn_cli.auditing.inputs import PROXY, Inputs
from fedqsn_cli.auditing.opened_proxy import OpenedProxy
from fedqsn_cli.auditing.registry import Rule
from fedqsn_cli.checkpoint.files import read_file

UNUSUAL_COMPANION = Rule(
    "FQ104",
    "unusual-companion",
    "gate",
    what="A tokenizer, template or configuration file is larger than any that is known, or holds a long text that is "
    "as good as random.",
    why="Every proxy holds these files as they are in the owner's folder; weights in them go out with each.",
    fix="Look at the file. If it must be as it is (some tokenizers hold a table in base64), waive this finding.",
    scope="invariants",
    needs=(PROXY,),
)

_LARGEST = {  # bytes; about twice the largest of well-known models
    "tokenizer.json": 80 << 20,
    "vocab.json": 16 << 20,
    "vocab.txt": 16 << 20,
    "merges.txt": 16 << 20,
    "tokenizer.model": 16 << 20,
    "spiece.model": 16 << 20,
    "sentencepiece.bpe.model": 16 << 20,
    "spm.model": 16 << 20,
    "source.spm": 16 << 20,
    "target.spm": 16 << 20,
    "bpe.codes": 16 << 20,
    "vocab.bpe": 16 << 20,
    "tekken.json": 32 << 20,
    "tokenizer_config.json": 4 << 20,
    "chat_template.jinja": 128 << 10,
    "chat_template.json": 128 << 10,
}
_OTHERS = 1 << 20
_BINARY = (".model", ".spm")
_RUN = re.compile(rb"[A-Za-z0-9+/=_-]{200,}")  # of base64 or hexadecimal digits
_RANDOM = 3.5  # bits a character; hexadecimal digits of weights have nearly 4, base64 nearly 6, repeated signs below 2


@check(UNUSUAL_COMPANION, each_proxy, problem="cannot be read")
def companions(inputs: Inputs, proxy: OpenedProxy) -> Iterator[Entry]:
    """Look at every companion of a proxy."""
    found = [finding for path in _paths(proxy) for finding in _problems(proxy, path)]
    yield from UNUSUAL_COMPANION.checked(proxy.scope, "sizes and long texts of all companions were looked at", found)


def _paths(proxy: OpenedProxy) -> list[Path]:
    return [proxy.folder / "config.json", *proxy.checkpoint.companions]


def _problems(proxy: OpenedProxy, path: Path) -> Iterator[Finding]:
    if not path.is_file():
        return
    size, most = path.stat().st_size, _LARGEST.get(path.name, _OTHERS)
    if size > most:
        message = f"{path.name} has {size} bytes; well-known models need no more than {most}"
        yield UNUSUAL_COMPANION.finding(proxy.scope, message, value=float(size), limit=float(most))
    elif not path.name.endswith(_BINARY):
        longest = max((len(run) for run in _RUN.findall(read_file(path, most)) if entropy(run) > _RANDOM), default=0)
        if longest:
            message = f"{path.name} holds {longest} characters in one piece that are as good as random"
            yield UNUSUAL_COMPANION.finding(proxy.scope, message, value=float(longest), limit=199.0)


def entropy(text: bytes) -> float:
    """Bits a character, from how often each occurs."""
    return -sum(count / len(text) * math.log2(count / len(text)) for count in Counter(text).values())
