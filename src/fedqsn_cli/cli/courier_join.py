"""`fedqsn courier-join`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fedqsn_cli import console
from fedqsn_cli.cli.command import argument

if TYPE_CHECKING:
    from fedqsn_cli.cli.views import ViewOptions
    from fedqsn_cli.options import CourierJoinOptions


def courier_join(
    path: Annotated[str, argument("INVITATION", "From the owner.")],
    options: CourierJoinOptions,
    view: ViewOptions,
) -> None:
    """Join a courier as a site; twice: with the data, and then with the owner's approval.

    The first time, keys are made that never leave the site, settings are written into site.toml, and a request for
    the owner. The site decides there which data is used and what the owner may ask for at most.

    Examples:

      fedqsn courier-join invitation.json --out site --name alice --data train.jsonl
      fedqsn courier-join invitation.json --out site --name alice --approval alice.approval
    """
    from fedqsn_cli.courier.setup import courier_join as run

    result = run(path, options)
    facts: list[tuple[str, object]] = [
        ("site", result.path),
        ("request", f"{result.next}: give it to the owner" if result.next else None),
        ("your key" if result.next else "the owner's key", result.fingerprint),
    ]
    console.show(view.mode, result, essential=[result.next or result.path], parts=[console.Facts(facts)])
