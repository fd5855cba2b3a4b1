"""`fedqsn courier-stop`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fedqsn_cli import console
from fedqsn_cli.cli.command import argument

if TYPE_CHECKING:
    from fedqsn_cli.cli.views import ViewOptions
    from fedqsn_cli.options import CourierStopOptions


def courier_stop(
    path: Annotated[str, argument("FOLDER", "The owner's folder, or that of a site.")],
    options: CourierStopOptions,
    view: ViewOptions,
) -> None:
    """Stop the daemons of a courier.

    A round that is on its way goes on with what it has when they are served again.

    Examples:

      fedqsn courier-stop courier
    """
    from fedqsn_cli.courier.serve import courier_stop as run

    result = run(path, options)
    told = "stopped" if result.stopped else "was not served"
    console.show(view.mode, result, essential=[result.path], parts=[console.Facts([(told, result.path)])])
