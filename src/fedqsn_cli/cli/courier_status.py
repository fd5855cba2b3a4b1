"""`fedqsn courier-status`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fedqsn_cli import console
from fedqsn_cli.cli.command import argument

if TYPE_CHECKING:
    from fedqsn_cli.cli.views import ViewOptions
    from fedqsn_cli.options import CourierStatusOptions


def courier_status(
    path: Annotated[str, argument("FOLDER", "The owner's folder, or that of a site.")],
    options: CourierStatusOptions,
    view: ViewOptions,
) -> None:
    """Show whether a courier is served, who has joined, and which sites are connected.

    Examples:

      fedqsn courier-status courier
    """
    from fedqsn_cli.courier.serve import courier_status as run

    result = run(path, options)
    connected = None if result.connected is None else ", ".join(result.connected) or "none"
    facts: list[tuple[str, object]] = [
        (result.role, result.path),
        ("server", result.server),
        ("process", result.process or "not served"),
        ("joined", ", ".join(result.joined) or None),
        ("connected", connected),
    ]
    console.show(view.mode, result, essential=[connected or result.process or "-"], parts=[console.Facts(facts)])
