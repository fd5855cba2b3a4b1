"""`fedqsn evaluate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fedqsn_cli import console
from fedqsn_cli.cli.command import argument

if TYPE_CHECKING:
    from fedqsn_cli.cli.views import EvaluateView
    from fedqsn_cli.options import EvaluateOptions
    from fedqsn_cli.training.scoring.scoring import Evaluation


def evaluate(
    checkpoints: Annotated[list[str], argument("CHECKPOINT...", "Global models, server models or proxies.")],
    options: EvaluateOptions,
    view: EvaluateView,
) -> None:
    """Measure models on data.

    Prints the loss and the measures of the model's task: accuracy, macro F1 and Matthews correlation; correlations for
    regression; entities for labels of words; perplexity for language models. With --generate, models that write texts
    answer the prompts. The factor that makes up for hidden neurons is applied, and quantized weights are used as
    clients see them. Data has the same format as for 'fedqsn client-train'. Of several models, --json prints an object
    by the names that were given.

    Examples:

      fedqsn evaluate global/ --data dev.jsonl
      fedqsn evaluate proxy/ --data dev.jsonl --json
      fedqsn evaluate global/ server/ proxies/* --data dev.jsonl
      fedqsn evaluate global/ --data dev.jsonl --generate --max-new-tokens 32
    """
    from fedqsn_cli.cli import tables
    from fedqsn_cli.training.evaluate import evaluate as run

    with console.progress(view.mode) as progress:
        results = {name: run(name, options, progress=progress) for name in dict.fromkeys(checkpoints)}
    first = next(iter(results.values()))
    left_out = console.Facts(tables.rows_left_out(first.skipped, first.cut, first.unused_columns))
    parts: list[console.Part] = [tables.evaluations(list(results.items()))]
    parts += [left_out] if any(value is not None for _, value in left_out.rows) else []
    document = results if len(results) > 1 else first
    console.show(view.mode, document, essential=[_essential(result) for result in results.values()], parts=parts)


def _essential(result: Evaluation) -> float:
    """The measure that says most about a model of this task."""
    found = (result.accuracy, result.pearson, result.perplexity, result.loss)
    return next(value for value in found if value is not None)
