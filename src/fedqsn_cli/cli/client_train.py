"""`fedqsn client-train`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from fedqsn_cli import console, text, validate
from fedqsn_cli.cli import options

if TYPE_CHECKING:
    from fedqsn_cli.training import TrainResult

TRAINING = options.TRAINING


def client_train(
    proxy: Annotated[str, options.argument("PROXY", text="The proxy: a folder or hf://owner/name[@revision].")],
    out: options.Out,
    data: Annotated[str, options.file("--data", text="Training data: JSONL, CSV or Parquet.", panel=options.DATA)],
    eval_data: Annotated[
        str | None,
        options.file("--eval-data", text="Data to measure the loss on, before and after.", panel=options.DATA),
    ] = None,
    max_length: options.MaxLength = 256,
    epochs: Annotated[
        float, options.real("--epochs", text="Passes over the data.", panel=TRAINING, check=validate.more_than_zero)
    ] = 1.0,
    max_steps: Annotated[
        int | None, options.count("--max-steps", text="Stop after this many steps.", panel=TRAINING)
    ] = None,
    lr: Annotated[
        float, options.real("--lr", text="Largest learning rate.", panel=TRAINING, check=validate.more_than_zero)
    ] = 5e-5,
    warmup_ratio: Annotated[
        float,
        options.real(
            "--warmup-ratio",
            text="Share of steps to warm up; then it falls to 0.",
            panel=TRAINING,
            check=validate.up_to_one,
        ),
    ] = 0.1,
    weight_decay: Annotated[
        float, options.real("--weight-decay", text="Weight decay of AdamW.", panel=TRAINING, check=options.not_negative)
    ] = 0.01,
    max_grad_norm: Annotated[
        float,
        options.real(
            "--max-grad-norm", text="Clip gradients to this norm.", panel=TRAINING, check=validate.more_than_zero
        ),
    ] = 1.0,
    batch_size: Annotated[int, options.count("--batch-size", text="Examples in a batch.", panel=TRAINING)] = 16,
    gradient_accumulation: Annotated[
        int, options.count("--gradient-accumulation", text="Batches in a step.", panel=TRAINING)
    ] = 1,
    seed: Annotated[
        int, options.count("--seed", text="Decides order and dropout, never what is hidden.", panel=TRAINING, least=0)
    ] = 0,
    device: Annotated[str, options.device(TRAINING)] = "auto",
    precision: Annotated[
        Literal["auto", "fp32", "bf16"],
        options.option("--precision", text="Number format of the computation.", panel=TRAINING),
    ] = "auto",
    update_format: Annotated[
        Literal["fp32", "bf16", "fp16"],
        options.option("--update-format", text="Number format of the update that is sent back.", panel=options.OUTPUT),
    ] = "fp32",
    force: options.Force = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a proxy on private data and write the update to send back.

    All visible neurons are trained; hidden ones get no gradient, no decay and no optimizer state. The task is read from
    the model's architecture. A line of data holds {"text", "label"}, {"text", "text_pair", "label"}, {"text"},
    {"prompt", "completion"} (the loss counts the completion only) or {"messages"} (through the chat template).

    Examples:

      fedqsn client-train proxy/ --out update/ --data train.jsonl
      fedqsn client-train proxy/ --out update/ --data train.csv --eval-data dev.csv --epochs 3 --lr 2e-5
      fedqsn client-train proxy/ --out update/ --data train.jsonl --batch-size 4 --gradient-accumulation 8 \\
          --update-format bf16
    """
    how = console.view(as_json, quiet)
    from fedqsn_cli import client_train as run

    with console.progress(how) as progress:
        result = run(
            proxy,
            out,
            data=data,
            eval_data=eval_data,
            max_length=max_length,
            epochs=epochs,
            max_steps=max_steps,
            lr=lr,
            warmup_ratio=warmup_ratio,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            batch_size=batch_size,
            gradient_accumulation=gradient_accumulation,
            seed=seed,
            device=device,
            precision=precision,
            update_format=update_format,
            force=force,
            progress=progress,
        )
    console.show(how, result, essential=[result.path], parts=_parts(result))


def _parts(result: TrainResult) -> list[console.Part]:
    from fedqsn_cli.cli import tables

    skipped = f" ({text.number(result.skipped)} rows skipped: nothing to learn from)" if result.skipped else ""
    facts: list[tuple[str, object]] = [
        ("update", result.path),
        ("trained on", f"{text.number(result.examples)} examples{skipped}"),
        ("steps", f"{text.number(result.steps)} in {result.seconds:.1f} s, {result.precision}"),
        ("training loss", f"{text.real(result.first_loss)} -> {text.real(result.last_loss)}"),
        ("numbers sent back", text.number(result.parameters)),
    ]
    measured = [(when, e) for when, e in (("before", result.before), ("after", result.after)) if e is not None]
    return [console.Facts(facts), *([tables.evaluations(measured)] if measured else [])]
