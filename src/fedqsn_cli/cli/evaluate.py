"""`fedqsn evaluate`."""

from __future__ import annotations

from typing import Annotated

from fedqsn_cli import console
from fedqsn_cli.cli import options


def evaluate(
    checkpoint: Annotated[str, options.argument("CHECKPOINT", text="A global model, server model or proxy.")],
    data: Annotated[str, options.file("--data", text="Evaluation data: JSONL, CSV or Parquet.", panel=options.DATA)],
    max_length: options.MaxLength = 256,
    batch_size: Annotated[
        int, options.count("--batch-size", text="Examples in a batch.", panel=options.COMPUTING)
    ] = 32,
    device: Annotated[str, options.device(options.COMPUTING)] = "auto",
    as_json: options.Json = False,
    quiet: Annotated[
        bool, options.option("--quiet", "-q", text="Print accuracy or perplexity only.", panel=options.OUTPUT)
    ] = False,
) -> None:
    """Measure a model on data.

    Prints loss, accuracy, macro F1 and perplexity, as far as the model's task has them. The scale that makes up for
    hidden neurons is applied, and quantized weights are used as clients see them. Data has the same form as for
    'fedqsn client-train'.

    Examples:

      fedqsn evaluate global/ --data dev.jsonl
      fedqsn evaluate proxy/ --data dev.jsonl --json
    """
    how = console.view(as_json, quiet)
    from fedqsn_cli import evaluate as run
    from fedqsn_cli.cli import tables

    with console.progress(how) as progress:
        result = run(
            checkpoint,
            data=data,
            max_length=max_length,
            batch_size=batch_size,
            device=device,
            progress=progress,
        )
    essential = result.accuracy if result.accuracy is not None else result.perplexity
    console.show(how, result, essential=[essential], parts=[tables.evaluations([(checkpoint, result)])])
