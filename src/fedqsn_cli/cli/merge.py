"""`fedqsn merge`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from fedqsn_cli import console, text, validate
from fedqsn_cli.cli import options

if TYPE_CHECKING:
    from fedqsn_cli.merging.line_search import Search
    from fedqsn_cli.merging.results import MergedClient, MergeResult


def _share(value: float, name: str) -> float:
    return validate.up_to_one(validate.more_than_zero(value, name), name)


def merge(
    checkpoint: Annotated[
        str,
        options.argument("CHECKPOINT", text="The global model or the server model that the proxies were made from."),
    ],
    out: options.Out,
    key: Annotated[str, options.file("--key", text="The job's secret.", panel=options.JOB)],
    updates: Annotated[list[str] | None, options.argument("UPDATE...", text="Updates to merge: folders.")] = None,
    ledger: Annotated[
        str | None,
        options.file("--ledger", text="Record of all releases; needed to merge updates.", panel=options.JOB),
    ] = None,
    normalize: Annotated[
        Literal["coverage", "clients"],
        options.option(
            "--normalize", text="Average a neuron over the clients that saw it, or over all.", panel=options.MERGING
        ),
    ] = "coverage",
    server_lr: Annotated[
        Any,
        options.real_or_auto(
            "--server-lr",
            text="Step size: 1 takes the average as it is; auto looks for the best.",
            panel=options.MERGING,
            check=validate.more_than_zero,
        ),
    ] = 1.0,
    allow_worse: Annotated[
        bool,
        options.option(
            "--allow-worse", text="With auto: take the best step even if the model gets worse.", panel=options.MERGING
        ),
    ] = False,
    control: Annotated[
        str | None,
        options.file(
            "--control",
            text="An update of your own, trained on your own data; what it did is taken off the clients' updates.",
            panel=options.MERGING,
            metavar="UPDATE",
        ),
    ] = None,
    control_weight: Annotated[
        float,
        options.real(
            "--control-weight", text="How much of the control is taken off.", panel=options.MERGING, check=_share
        ),
    ] = 1.0,
    restore: Annotated[
        str | None,
        options.file(
            "--restore",
            text="Put this trained server model's visible neurons into CHECKPOINT.",
            panel=options.RESTORING,
            metavar="SERVER",
        ),
    ] = None,
    public_base: Annotated[
        str | None,
        options.file(
            "--public-base",
            text="The public model of the job, if clients trained it in the holes (--train all).",
            panel=options.RESTORING,
            metavar="BASE",
        ),
    ] = None,
    blend: Annotated[
        Any,
        options.real_or_auto(
            "--blend",
            text="How far hidden neurons come back: 1 in full, 0 not at all; auto looks for the best.",
            panel=options.RESTORING,
            check=validate.up_to_one,
        ),
    ] = 1.0,
    eval_data: Annotated[
        str | None,
        options.file(
            "--eval-data", text="Your development data, for auto: JSONL, CSV or Parquet.", panel=options.SEARCHING
        ),
    ] = None,
    max_length: Annotated[
        int, options.count("--max-length", text="Cut texts to this many tokens.", panel=options.SEARCHING)
    ] = 256,
    batch_size: Annotated[
        int, options.count("--batch-size", text="Examples in a batch.", panel=options.SEARCHING)
    ] = 32,
    device: Annotated[str, options.device(options.SEARCHING)] = "auto",
    report: Annotated[
        str | None,
        options.file("--report", text="Write a page about what auto tried: one HTML file.", panel=options.SEARCHING),
    ] = None,
    max_update_norm: Annotated[
        float,
        options.real(
            "--max-update-norm",
            text="Refuse an update whose norm is more than this many times the model's.",
            panel=options.LIMITS,
            check=validate.more_than_zero,
        ),
    ] = 10.0,
    max_examples: Annotated[
        int | None,
        options.count("--max-examples", text="Refuse an update that claims more examples.", panel=options.LIMITS),
    ] = None,
    max_shard_size: options.ShardSize = "5GB",
    force: options.Force = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Merge clients' updates into a model.

    Updates are weighted by their numbers of examples; neurons that were hidden keep their values bit for bit. Every
    update is checked against the ledger: one that is stale, foreign, given twice, not finite or far too large is
    refused, and then nothing is written.

    A server model stays a server model. At the end of the job, 'fedqsn merge GLOBAL --restore SERVER' puts its trained
    neurons and the hidden ones of the global model together.

    With --server-lr auto or --blend auto the model is measured on your development data at a dozen values, and the
    one with the lowest loss is taken. If no step makes the model better, nothing is written and the exit code is 1.

    Examples:

      fedqsn merge global/ updates/* --out next/ --key job.key --ledger ledger.jsonl
      fedqsn merge server/ updates/* --out server-2/ --key job.key --ledger ledger.jsonl --normalize clients
      fedqsn merge global/ updates/* --out next/ --key job.key --ledger ledger.jsonl \\
          --server-lr auto --eval-data dev.jsonl --control own-update/
      fedqsn merge global/ --restore server-9/ --out final/ --key job.key --blend 0.5
      fedqsn merge global/ --restore server-9/ --out final/ --key job.key --blend auto --eval-data dev.jsonl
      fedqsn merge global/ --restore server-9/ --out final/ --key job.key --public-base hf://owner/base
    """
    how = console.view(as_json, quiet)
    from fedqsn_cli import merge as run

    with console.progress(how) as progress:
        result = run(
            checkpoint,
            updates or [],
            out,
            key=key,
            ledger=ledger,
            normalize=normalize,
            server_lr=server_lr,
            allow_worse=allow_worse,
            control=control,
            control_weight=control_weight,
            restore=restore,
            public_base=public_base,
            blend=blend,
            eval_data=eval_data,
            batch_size=batch_size,
            max_length=max_length,
            device=device,
            max_update_norm=max_update_norm,
            max_examples=max_examples,
            report=report,
            max_shard_size=max_shard_size,
            force=force,
            progress=progress,
        )
    console.show(how, result, essential=[result.path], parts=_parts(result))


def _parts(result: MergeResult) -> list[console.Part]:
    facts: list[tuple[str, object]] = [(result.kind.replace("-", " "), result.path)]
    if result.clients:
        facts.append(("trained by a client", f"{text.percent(result.covered)} of all parameters"))
    parts: list[console.Part] = [_clients(result)] if result.clients else []
    parts += [_curve(result.search)] if result.search else []
    return [*parts, console.Facts(facts)]


def _clients(result: MergeResult) -> console.Table:
    names = ("client", "round", "examples", "share", "update / model", "loss before", "loss after")
    rows = [_client(each, text.percent(each.share)) for each in result.clients]
    rows += [_client(result.control, "control")] if result.control else []
    return console.Table(names, rows, numbers=frozenset(names[1:]))


def _client(each: MergedClient, share: str) -> tuple[object, ...]:
    return (
        each.client,
        each.round,
        text.number(each.num_examples),
        share,
        f"{each.relative_norm:.2g}",
        text.real(each.first_loss),
        text.real(each.last_loss),
    )


def _curve(search: Search) -> console.Table:
    """What auto tried, with a mark at what it took."""
    names = (search.option.removeprefix("--"), "loss", _score(search))
    rows = [
        (
            f"{point.value:.10g}",
            f"{point.loss:.6g}",
            text.real(getattr(point, names[2])),
            "<- taken" if point.value == search.chosen else "",
        )
        for point in search.curve
    ]
    return console.Table((*names, ""), rows, numbers=frozenset(names))


def _score(search: Search) -> str:
    return "perplexity" if search.at(search.chosen).accuracy is None else "accuracy"
