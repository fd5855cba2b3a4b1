"""`fedqsn keygen`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fedqsn_cli import console
from fedqsn_cli.cli.command import argument

if TYPE_CHECKING:
    from fedqsn_cli.cli.views import ViewOptions
    from fedqsn_cli.options import KeygenOptions


def keygen(
    path: Annotated[str, argument("KEY", "The private key: a file to write.")],
    options: KeygenOptions,
    view: ViewOptions,
) -> None:
    """Make a key pair, to sign with and to be sent sealed folders.

    Everybody who takes part makes one: the owner, and each client. The private file stays where it is; the public one
    goes to the others, by a way on which nobody can exchange it.

    Examples:

      fedqsn keygen alice.key
    """
    from fedqsn_cli.crypto.keys import keygen as run

    result = run(path, options)
    facts: list[tuple[str, object]] = [
        ("private key", f"{result.private}: keep it secret, and keep it"),
        ("public key", f"{result.public}: give it to the others"),
        ("fingerprint", result.fingerprint),
    ]
    console.show(view.mode, result, essential=[result.public], parts=[console.Facts(facts)])
