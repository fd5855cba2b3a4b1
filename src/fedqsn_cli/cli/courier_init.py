"""`fedqsn courier-init`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fedqsn_cli import console
from fedqsn_cli.cli.command import argument

if TYPE_CHECKING:
    from fedqsn_cli.cli.views import ViewOptions
    from fedqsn_cli.options import CourierInitOptions


def courier_init(
    path: Annotated[str, argument("COURIER", "The folder to make.")],
    options: CourierInitOptions,
    view: ViewOptions,
) -> None:
    """Set up a courier: the owner's certificates, the server's kit, and the invitation for sites.

    The courier carries sealed proxies to the sites and sealed updates back, by NVIDIA FLARE over mutual TLS, to one
    port of the server. Give invitation.json to the sites. With --local, sites are made on this machine, too: the whole
    thing without a network; put their data where sites/CLIENT/site.toml says.

    Examples:

      fedqsn courier-init courier --server fl.example.org:443 --key owner.pub
      fedqsn courier-init courier --key owner.pub --local alice --local bob
    """
    from fedqsn_cli.courier.setup import courier_init as run

    result = run(path, options)
    facts: list[tuple[str, object]] = [
        ("courier", result.path),
        ("invitation", f"{result.next}: give it to the sites"),
        ("your key", result.fingerprint),
    ]
    console.show(view.mode, result, essential=[result.path], parts=[console.Facts(facts)])
