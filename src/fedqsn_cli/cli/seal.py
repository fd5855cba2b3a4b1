"""`fedqsn seal`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fedqsn_cli import console, text
from fedqsn_cli.cli.command import argument

if TYPE_CHECKING:
    from fedqsn_cli.cli.views import ViewOptions
    from fedqsn_cli.options import SealOptions


def seal(
    path: Annotated[str, argument("PATH", "A proxy or an update.")],
    options: SealOptions,
    view: ViewOptions,
) -> None:
    """Encrypt a proxy or an update, so that only its recipient can open it.

    Whoever carries the file, or stores it, sees its size and nothing else. Sealing hides the sender, too: sign what is
    inside.

    Examples:

      fedqsn seal proxies/alice --to alice.pub --out alice.sealed
    """
    from fedqsn_cli.crypto.seal import seal as run

    result = run(path, options)
    facts: list[tuple[str, object]] = [("sealed", result.path), ("size", text.size(result.bytes))]
    console.show(view.mode, result, essential=[result.path], parts=[console.Facts(facts)])
