"""`fedqsn verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fedqsn_cli import console
from fedqsn_cli.cli.command import argument

if TYPE_CHECKING:
    from fedqsn_cli.cli.views import ViewOptions
    from fedqsn_cli.options import VerifyOptions


def verify(
    path: Annotated[str, argument("PATH", "A proxy, an update, or the attestation of an audit.")],
    options: VerifyOptions,
    view: ViewOptions,
) -> None:
    """Check who signed a folder, and that nothing in it was changed, added or removed.

    Proxies and updates are signed as OpenSSF model signing defines it; 'model_signing verify key' checks the same.

    Examples:

      fedqsn verify proxy/ --key owner.pub
      fedqsn verify audit.intoto.json --key owner.pub
    """
    from fedqsn_cli.crypto.verify import verify as run

    result = run(path, options)
    facts: list[tuple[str, object]] = [
        ("signed", result.path),
        ("signer", result.signer),
        ("verdict", result.verdict),
    ]
    table = console.Table(("file" if result.kind == "folder" else "proxy", "sha256"), sorted(result.files.items()))
    console.show(view.mode, result, essential=[result.signer], parts=[console.Facts(facts), table])
