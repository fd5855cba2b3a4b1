"""`fedqsn courier-send`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fedqsn_cli import console
from fedqsn_cli.cli.command import argument

if TYPE_CHECKING:
    from fedqsn_cli.cli.views import ViewOptions
    from fedqsn_cli.options import CourierSendOptions


def courier_send(
    path: Annotated[str, argument("COURIER", "The host's folder, or the owner's.")],
    outbox: Annotated[str, argument("OUTBOX", "Sealed proxies and orders, from 'fedqsn courier-pack'.")],
    options: CourierSendOptions,
    view: ViewOptions,
) -> None:
    """Send the sealed proxies of an outbox to their clients, and wait for their updates.

    Neither the job's key nor the ledger nor a private key of the owner is needed: orders and the verdict of the audit
    are checked with the owner's public key. Updates come back sealed, as --into/CLIENT.update; open them with
    'fedqsn unseal' where the owner's key is. With --key, they are opened here, and taken only if their clients signed
    them for these proxies; the folders in --into are for 'fedqsn merge'.

    The sites may refuse what an order asks for. A transfer or a site that is interrupted goes on where it was; so does
    this command when it is run again.

    Exit code 1: fewer than --at-least updates came before the deadline.

    Examples:

      fedqsn courier-send courier outbox --into updates --key owner.key --at-least 2 --deadline 6h
      fedqsn courier-send host outbox --into inbox --at-least 2 --deadline 6h
    """
    from fedqsn_cli.courier.send import courier_send as run

    with console.progress(view.mode) as progress:
        result = run(path, outbox, options, progress=progress)
    rows = [(client.client, client.state, client.update or "", client.jobs) for client in result.clients]
    table = console.Table(("client", "state", "update", "jobs"), rows, numbers=frozenset({"jobs"}))
    essential = [client.update for client in result.clients if client.update is not None]
    console.show(view.mode, result, essential=essential, parts=[table])
