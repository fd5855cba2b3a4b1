"""`fedqsn export-proxy`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fedqsn_cli import console, text
from fedqsn_cli.cli.command import argument

if TYPE_CHECKING:
    from fedqsn_cli.cli.views import ViewOptions
    from fedqsn_cli.options import ExportOptions


def export_proxy(
    checkpoint: Annotated[
        str, argument("CHECKPOINT", "The global model, the server model, or the quantized server model.")
    ],
    options: ExportOptions,
    view: ViewOptions,
) -> None:
    """Make what clients get, and record the release.

    A global model is masked, quantized, and masked again for each client; for a server model the first steps are
    skipped. A proxy holds no hidden weight and nothing about the key, and is an ordinary Hugging Face model folder. The
    model is read and quantized once, however many clients there are. The same export run again gives the same bytes and
    no second line in the ledger.

    With --budget, a release that would show a client (or, with --coalition, so many clients together) too much of the
    model over all rounds is refused before anything is written; the exit code is 1 then.

    With --where and --layers only a part of the model is hidden; the rest is in the clear, but quantized. A preset sets
    several options at once: paper hides as the method's authors did, strong hides as much as a public base allows.

    With --train all (and a public base in the holes) clients train what is in the holes, too, and what they
    learn there is added to the hidden neurons at the end, by 'fedqsn merge --restore'. So nearly everything can be
    hidden, and still be improved. Merge such updates into the server model.

    Examples:

      fedqsn export-proxy global/ --out proxy/ --client alice --round 1 \\
          --p1 0.1 --p2 0.1 --key job.key --ledger ledger.jsonl
      fedqsn export-proxy global/ --out proxy/ --client alice --round 1 --p2 0.1 --key job.key \\
          --ledger ledger.jsonl --preset paper --p1 0.1 --p1-schedule 0-2=0.9
      fedqsn export-proxy server/ --out 'proxies/{client}' --client alice --client bob --round 2 \\
          --p2 0.1 --key job.key --ledger ledger.jsonl --format nf3 --budget 0.95 --coalition 3
    """
    from fedqsn_cli.cli import tables
    from fedqsn_cli.export.proxy import export_proxy as run

    with console.progress(view.mode) as progress:
        result = run(checkpoint, options, progress=progress)
    proxies = console.Table(
        ("client", "proxy", "size", "id"),
        [(proxy.client, proxy.path, text.size(proxy.bytes), proxy.proxy_id[:12]) for proxy in result.proxies],
        numbers=frozenset({"size"}),
    )
    facts: list[tuple[str, object]] = [
        ("quantization", tables.quantization(result.quantization)),
        ("hidden by the server", text.percent(result.hidden_by_server)),
        ("hidden from a client", text.percent(result.hidden_from_client)),
        *tables.shares(result.shares),
        ("public base", tables.public_base(result.public_base)),
        ("pushed", ", ".join(proxy.pushed for proxy in result.proxies if proxy.pushed) or None),
        ("new key", f"{options.key}: keep it secret, and keep it" if result.key_created else None),
    ]
    essential = [proxy.path for proxy in result.proxies]
    console.show(view.mode, result, essential=essential, parts=[proxies, console.Facts(facts)])
