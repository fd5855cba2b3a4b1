"""`fedqsn consolidate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fedqsn_cli import console, text
from fedqsn_cli.cli.command import argument

if TYPE_CHECKING:
    from fedqsn_cli.cli.views import ViewOptions
    from fedqsn_cli.merging.consolidate import ConsolidateResult
    from fedqsn_cli.merging.ending.rate_search import RateSearch
    from fedqsn_cli.merging.ending.weight_search import WeightSearch
    from fedqsn_cli.options import ConsolidateOptions


def consolidate(
    checkpoint: Annotated[str, argument("GLOBAL", "The global model, as it was before the job.")],
    server: Annotated[str, argument("SERVER", "The trained server model that the job ended with.")],
    options: ConsolidateOptions,
    view: ViewOptions,
) -> None:
    """End a job: train the restored model to agree with the global model and with the server model.

    The student starts from 'merge --restore' with a blend. On your own data it learns to answer as the global model
    does, and on transfer texts as the server model does, which clients trained. A language model writes the texts that
    you do not give, as it would answer. No client takes part, and nothing is sent.

    With --transfer-weight auto a student is trained with each of five weights. Of those that keep your own skill,
    measured on --own-eval-data, the one with the lowest loss on --eval-data is written. If none keeps it, or none has
    less loss on --eval-data than the global model, nothing is written and the exit code is 1.

    Examples:

      fedqsn consolidate global/ server-9/ --out final/ --key job.key --own-data own.jsonl
      fedqsn consolidate global/ server-9/ --out final/ --key job.key --own-data own.jsonl \\
          --transfer-data texts.jsonl --public-base hf://owner/base --eval-data dev.jsonl
      fedqsn consolidate global/ server-9/ --out final/ --key job.key --own-data own.jsonl \\
          --transfer-weight auto --own-eval-data own-dev.jsonl --eval-data dev.jsonl
    """
    from fedqsn_cli.merging.consolidate import consolidate as run

    with console.progress(view.mode) as progress:
        result = run(checkpoint, server, options, progress=progress)
    console.show(view.mode, result, essential=[result.path], parts=_parts(result))


def _parts(result: ConsolidateResult) -> list[console.Part]:
    from fedqsn_cli.cli import tables

    written = {True: ", written by the model itself", False: ""}
    facts: list[tuple[str, object]] = [
        ("global model", result.path),
        ("own texts", f"{text.number(result.own_texts)}{written[result.own_written]}"),
        ("transfer texts", f"{text.number(result.transfer_texts)}{written[result.transfer_written]}"),
        ("transfer weight", f"{result.transfer_weight:g}"),
        ("learning rate", f"{result.lr:g}"),
        ("steps", f"{text.number(result.steps)} in {result.seconds:.1f} s"),
        ("divergence", f"{text.real(result.first_loss)} -> {text.real(result.last_loss)}"),
    ]
    named = {"global": result.before, f"restored, blend {result.blend:g}": result.restored, "final": result.after}
    measured = [(when, one) for when, one in named.items() if one is not None]
    parts: list[console.Part] = [console.Facts(facts)]
    parts += [tables.evaluations(measured)] if measured else []
    parts += [_rates(result.rates)] if result.rates is not None else []
    return parts + ([_trials(result.search)] if result.search is not None else [])


def _rates(search: RateSearch) -> console.Table:
    """The learning rates that auto tried, with a mark at what it took."""
    names = ("learning rate", "divergence on texts kept out")
    return console.Table((*names, ""), search.rows("<- taken"), numbers=frozenset(names))


def _trials(search: WeightSearch) -> console.Table:
    """What auto tried, with a mark at what it took."""
    names = ("transfer weight", "loss on own skill", "on what clients teach")
    return console.Table((*names, ""), search.rows("<- taken"), numbers=frozenset(names))
