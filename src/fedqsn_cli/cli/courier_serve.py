"""`fedqsn courier-serve`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fedqsn_cli import console
from fedqsn_cli.cli.command import argument

if TYPE_CHECKING:
    from fedqsn_cli.cli.views import ViewOptions
    from fedqsn_cli.options import CourierServeOptions


def courier_serve(
    path: Annotated[str, argument("FOLDER", "The owner's folder, or that of a site.")],
    options: CourierServeOptions,
    view: ViewOptions,
) -> None:
    """Run the daemons of a courier until they are stopped: the server, or a site.

    Those that die are started again. On the owner's side, sites of --local are served, too. Logs are in daemon.log of
    each kit, and what a site was asked for in its courier.log.

    Examples:

      fedqsn courier-serve courier
      fedqsn courier-serve site
    """
    from fedqsn_cli.courier.serve import courier_serve as run

    result = run(path, options)
    console.show(view.mode, result, essential=[result.path], parts=[console.Facts([("stopped", result.path)])])
