"""`fedqsn evaluate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fedqsn_cli import console
from fedqsn_cli.cli.command import argument

if TYPE_CHECKING:
    from fedqsn_cli.cli.views import EvaluateView
    from fedqsn_cli.options import EvaluateOptions
    from fedqsn_cli.training.scoring import Evaluation


def evaluate(
    checkpoint: Annotated[str, argument("CHECKPOINT", "A global model, server model or proxy.")],
    options: EvaluateOptions,
    view: EvaluateView,
) -> None:
    """Measure a model on data.

    Prints the loss and the measures of the model's task: accuracy, macro F1 and Matthews correlation; correlations for
    regression; entities for labels of words; perplexity for language models. With --generate, models that write texts
    answer the prompts. The factor that makes up for hidden neurons is applied, and quantized weights are used as
    clients see them. Data has the same format as for 'fedqsn client-train'.

    Examples:

      fedqsn evaluate global/ --data dev.jsonl
      fedqsn evaluate proxy/ --data dev.jsonl --json
      fedqsn evaluate global/ --data dev.jsonl --generate --max-new-tokens 32
    """
    from fedqsn_cli.cli import tables
    from fedqsn_cli.training.evaluate import evaluate as run

    with console.progress(view.mode) as progress:
        result = run(checkpoint, options, progress=progress)
    left_out = console.Facts(tables.rows_left_out(result.skipped, result.cut, result.unused_columns))
    parts: list[console.Part] = [tables.evaluations([(checkpoint, result)])]
    parts += [left_out] if any(value is not None for _, value in left_out.rows) else []
    console.show(view.mode, result, essential=[_essential(result)], parts=parts)


def _essential(result: Evaluation) -> float:
    """The measure that says most about a model of this task."""
    found = (result.accuracy, result.pearson, result.perplexity, result.loss)
    return next(value for value in found if value is not None)
