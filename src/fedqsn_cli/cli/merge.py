"""`fedqsn merge`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fedqsn_cli import console, text
from fedqsn_cli.cli.command import argument

if TYPE_CHECKING:
    from fedqsn_cli.cli.views import ViewOptions
    from fedqsn_cli.merging.ending.line_search import Search
    from fedqsn_cli.merging.results import MergedClient, MergeResult
    from fedqsn_cli.options import MergeOptions


def merge(
    checkpoint: Annotated[
        str, argument("CHECKPOINT", "The global model or the server model that the proxies were made from.")
    ],
    options: MergeOptions,
    view: ViewOptions,
    updates: Annotated[
        list[str] | None, argument("UPDATE...", "Updates, or partial sums of updates, to merge: folders.")
    ] = None,
) -> None:
    """Merge clients' updates into a model.

    Updates are weighted by their numbers of examples; neurons that were hidden keep their values bit for bit. Every
    update is checked against the ledger: one that is stale, foreign, given twice, not finite or far too large is
    refused, and then nothing is written; with --on-refused skip the others are merged without it. Among three or more
    updates, one that claims more than ten times the median number of examples is refused, too, unless --max-examples
    allows it.

    An average follows everyone, an attacker too. --rule takes a median or another rule that withstands --byzantine f of
    them, each unit over the clients that saw it.

    With --partial the updates are added up only. The sum is given to another merge in place of the updates in it, and
    however they are grouped, the model is the same to the last byte: many machines can share the work.

    A server model stays a server model. At the end of the job, 'fedqsn merge GLOBAL --restore SERVER' puts its trained
    neurons and the hidden ones of the global model together.

    With --server-lr auto or --blend auto the model is measured on your development data at a dozen values, and the
    one with the lowest loss is taken. If no step makes the model better, nothing is written and the exit code is 1.

    Examples:

      fedqsn merge global/ updates/* --out next/ --key job.key --ledger ledger.jsonl
      fedqsn merge server/ updates/* --out server-2/ --key job.key --ledger ledger.jsonl --normalize clients
      fedqsn merge global/ updates/* --out next/ --key job.key --ledger ledger.jsonl \\
          --server-lr auto --eval-data dev.jsonl --control own-update/
      fedqsn merge global/ updates/* --out next/ --key job.key --ledger ledger.jsonl \\
          --rule trimmed-mean --byzantine 2 --clip-norm auto
      fedqsn merge global/ updates/a* --partial --out sum-a/ --key job.key --ledger ledger.jsonl
      fedqsn merge global/ sum-*/ --out next/ --key job.key --ledger ledger.jsonl
      fedqsn merge global/ --restore server-9/ --out final/ --key job.key --blend 0.5
      fedqsn merge global/ --restore server-9/ --out final/ --key job.key --blend auto --eval-data dev.jsonl
      fedqsn merge global/ --restore server-9/ --out final/ --key job.key --public-base hf://owner/base
    """
    from fedqsn_cli.merging.merge import merge as run

    with console.progress(view.mode) as progress:
        result = run(checkpoint, updates or [], options, progress=progress)
    console.show(view.mode, result, essential=[result.path], parts=_parts(result))


def _parts(result: MergeResult) -> list[console.Part]:
    facts: list[tuple[str, object]] = [(result.kind.replace("-", " "), result.path)]
    if result.clients:
        facts.append(("trained by a client", f"{text.percent(result.covered)} of all parameters"))
    if result.adapter is not None:
        exact = (
            f"rank {result.adapter.rank} of {result.adapter.summed_rank}, error {text.percent(result.adapter.error)}"
        )
        facts += [("adapter", result.adapter.path), ("of that adapter", exact)]
    if result.privacy is not None:
        told = result.privacy
        over = f"{told.merges} merge{'s' * (told.merges > 1)} with noise"
        facts.append(("privacy of a client", f"ε = {told.epsilon:.4g} at δ = {told.delta:g}, {over}"))
    parts: list[console.Part] = [_clients(result)] if result.clients else []
    parts += [_refused(result)] if result.refused else []
    parts += [_curve(result.search)] if result.search else []
    return [*parts, console.Facts(facts)]


def _clients(result: MergeResult) -> console.Table:
    names = ("client", "examples", "weight", "norm / model", "cosine", "coverage", "largest unit", "loss", "verdict")
    rows = [_client(client) for client in [*result.clients, *([result.control] if result.control else [])]]
    return console.Table(names, rows, numbers=frozenset(names[1:6]))


def _client(client: MergedClient) -> tuple[object, ...]:
    largest = client.largest_unit
    return (
        client.client,
        text.number(client.num_examples),
        text.percent(client.share),
        f"{client.relative_norm:.2g}",
        "-" if client.cosine is None else f"{client.cosine:.3f}",
        text.percent(client.coverage),
        f"{largest.tensor} {largest.unit}: {largest.ratio:.2g}",
        f"{text.real(client.first_loss)} to {text.real(client.last_loss)}",
        client.verdict,
    )


def _refused(result: MergeResult) -> console.Table:
    rows = [(item.client or item.folder, item.reason) for item in result.refused]
    return console.Table(("refused", "why"), rows)


def _curve(search: Search) -> console.Table:
    """What auto tried, with a mark at what it took."""
    names = (search.option.removeprefix("--"), "loss", search.metric)
    rows = [
        (
            f"{point.value:.10g}",
            f"{point.loss:.6g}",
            text.real(getattr(point, search.metric)),
            "<- taken" if point.value == search.chosen else "",
        )
        for point in search.curve
    ]
    return console.Table((*names, ""), rows, numbers=frozenset(names))
