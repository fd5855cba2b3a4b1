"""`fedqsn unseal`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fedqsn_cli import console
from fedqsn_cli.cli.command import argument

if TYPE_CHECKING:
    from fedqsn_cli.cli.views import ViewOptions
    from fedqsn_cli.options import UnsealOptions


def unseal(
    path: Annotated[str, argument("FILE", "What was sealed for you.")],
    options: UnsealOptions,
    view: ViewOptions,
) -> None:
    """Open a sealed proxy or update.

    A file that was cut off, changed, or sealed for another key is refused, and nothing is written. Anybody can seal a
    folder for you: with --verify-key, only what the owner of that key signed is taken.

    Examples:

      fedqsn unseal alice.sealed --out proxy/ --key alice.key --verify-key owner.pub
    """
    from fedqsn_cli.crypto.seal import unseal as run

    result = run(path, options)
    facts: list[tuple[str, object]] = [
        ("opened", result.path),
        ("signature", "verified" if result.verified else "not checked"),
    ]
    console.show(view.mode, result, essential=[result.path], parts=[console.Facts(facts)])
