"""`fedqsn courier-pack`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fedqsn_cli import console
from fedqsn_cli.cli.command import argument

if TYPE_CHECKING:
    from fedqsn_cli.cli.views import ViewOptions
    from fedqsn_cli.options import CourierPackOptions


def courier_pack(
    path: Annotated[str, argument("COURIER", "The owner's folder.")],
    proxies: Annotated[list[str], argument("PROXY...", "Proxies of one round: folders.")],
    options: CourierPackOptions,
    view: ViewOptions,
) -> None:
    """Seal audited proxies for their clients, with what the clients are asked to train.

    The ledger says whom a proxy is for. Each is sealed for its client, if the attestation says that it passed an audit
    and is unchanged. An order, signed with --key, names the sealed bytes and how to train; the site may refuse it.

    The folder that is made holds nothing that the courier's host may not see: send it from here, or carry it to the
    host, and run 'fedqsn courier-send' there.

    Examples:

      fedqsn courier-pack courier proxies/alice proxies/bob --out outbox --key owner.key \\
          --ledger ledger.jsonl --attestation audit.intoto.json --epochs 3 --lr 2e-4
      fedqsn courier-pack courier proxies/alice --out outbox --key owner.key --ledger ledger.jsonl \\
          --attestation audit.intoto.json --method lora --lora-r 16
    """
    from fedqsn_cli.courier.outbox import courier_pack as run

    result = run(path, proxies, options)
    facts: list[tuple[str, object]] = [
        ("outbox", result.path),
        ("clients", ", ".join(result.clients)),
        ("sealed", f"{result.bytes:,} bytes"),
    ]
    console.show(view.mode, result, essential=[result.path], parts=[console.Facts(facts)])
