"""`fedqsn courier-send`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fedqsn_cli import console
from fedqsn_cli.cli.command import argument

if TYPE_CHECKING:
    from fedqsn_cli.cli.views import ViewOptions
    from fedqsn_cli.options import CourierSendOptions


def courier_send(
    path: Annotated[str, argument("COURIER", "The owner's folder.")],
    proxies: Annotated[list[str], argument("PROXY...", "Proxies of one round: folders.")],
    options: CourierSendOptions,
    view: ViewOptions,
) -> None:
    """Send audited proxies to their clients, and wait for their updates.

    The ledger says whom a proxy is for. Each is sealed for its client, and is sent only if the attestation says that
    it passed an audit and is unchanged. An update is taken only if its client signed it for that proxy; the folders in
    --into are for 'fedqsn merge'.

    The sites may refuse what is asked for (--epochs, --lr, --batch-size, --update-format). A transfer or a site that
    is interrupted goes on where it was; so does this command when it is run again.

    Exit code 1: fewer than --at-least updates came before the deadline.

    Examples:

      fedqsn courier-send courier proxies/alice proxies/bob --into updates --key owner.key \\
          --ledger ledger.jsonl --attestation audit.intoto.json --at-least 2 --deadline 6h
    """
    from fedqsn_cli.courier.send import courier_send as run

    with console.progress(view.mode) as progress:
        result = run(path, proxies, options, progress=progress)
    rows = [(client.client, client.state, client.update or "", client.jobs) for client in result.clients]
    table = console.Table(("client", "update", "folder", "jobs"), rows, numbers=frozenset({"jobs"}))
    essential = [client.update for client in result.clients if client.update is not None]
    console.show(view.mode, result, essential=essential, parts=[table])
