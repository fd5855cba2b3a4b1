"""`fedqsn evaluate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fedqsn_cli import console
from fedqsn_cli.cli.command import argument

if TYPE_CHECKING:
    from fedqsn_cli.cli.views import EvaluateView
    from fedqsn_cli.options import EvaluateOptions


def evaluate(
    checkpoint: Annotated[str, argument("CHECKPOINT", "A global model, server model or proxy.")],
    options: EvaluateOptions,
    view: EvaluateView,
) -> None:
    """Measure a model on data.

    Prints loss, accuracy, macro F1 and perplexity, as far as the model's task has them. The factor that makes up for
    hidden neurons is applied, and quantized weights are used as clients see them. Data has the same format as for
    'fedqsn client-train'.

    Examples:

      fedqsn evaluate global/ --data dev.jsonl
      fedqsn evaluate proxy/ --data dev.jsonl --json
    """
    from fedqsn_cli.cli import tables
    from fedqsn_cli.training.evaluate import evaluate as run

    with console.progress(view.mode) as progress:
        result = run(checkpoint, options, progress=progress)
    essential = result.accuracy if result.accuracy is not None else result.perplexity
    console.show(view.mode, result, essential=[essential], parts=[tables.evaluations([(checkpoint, result)])])
