"""FQ104: could the files beside the weights carry weights? They are the owner's own, so no comparison finds that.

`checkpoint.companion_limits` says how much such files may say; `export-proxy` tells of the same before a release.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedqsn_cli.auditing.checks import check, each_proxy
from fedqsn_cli.auditing.findings import Entry, Finding
from fedqsn_cli.auditing.inputs import PROXY, Inputs
from fedqsn_cli.auditing.opened_proxy import OpenedProxy
from fedqsn_cli.auditing.registry import Rule
from fedqsn_cli.checkpoint.companion_limits import excess, most_tokens
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


@check(UNUSUAL_COMPANION, each_proxy, problem="cannot be read")
def companions(inputs: Inputs, proxy: OpenedProxy) -> Iterator[Entry]:
    """Look at every companion of a proxy."""
    found = [finding for path in _paths(proxy) for finding in _problems(proxy, path)]
    yield from UNUSUAL_COMPANION.checked(proxy.scope, "sizes and long texts of all companions were looked at", found)


def _paths(proxy: OpenedProxy) -> list[Path]:
    paths = [proxy.folder / "config.json", *proxy.checkpoint.companions]
    return [path for path in paths if path.is_file()]


def _problems(proxy: OpenedProxy, path: Path) -> Iterator[Finding]:
    tokens = most_tokens(tensor.shape for tensor in proxy.tensors.values())
    found = excess(path.name, read_file(path, MAX_COMPANION_BYTES), tokens)
    if found is not None:
        value, limit = float(found.value), float(found.limit)
        yield UNUSUAL_COMPANION.finding(proxy.scope, found.message, value=value, limit=limit)
