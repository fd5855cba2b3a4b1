"""`fedqsn merge`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from fedqsn_cli import console, validate
from fedqsn_cli.cli import options

if TYPE_CHECKING:
    from fedqsn_cli.aggregation.merge import MergeResult


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
        float,
        options.real(
            "--server-lr",
            text="Step size: 1 takes the average as it is.",
            panel=options.MERGING,
            check=validate.more_than_zero,
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
    blend: Annotated[
        float,
        options.real(
            "--blend",
            text="How far hidden neurons come back: 1 in full, 0 not at all.",
            panel=options.RESTORING,
            check=validate.up_to_one,
        ),
    ] = 1.0,
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

    Examples:

      fedqsn merge global/ updates/* --out next/ --key job.key --ledger ledger.jsonl
      fedqsn merge server/ updates/* --out server-2/ --key job.key --ledger ledger.jsonl --normalize clients
      fedqsn merge global/ --restore server-9/ --out final/ --key job.key --blend 0.5
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
            restore=restore,
            blend=blend,
            max_update_norm=max_update_norm,
            max_examples=max_examples,
            max_shard_size=max_shard_size,
            force=force,
            progress=progress,
        )
    console.show(how, result, essential=[result.path], parts=_parts(result))


def _parts(result: MergeResult) -> list[console.Part]:
    clients = console.Table(
        ("client", "round", "examples", "share", "update / model", "loss before", "loss after"),
        [
            (
                each.client,
                each.round,
                console.number(each.num_examples),
                console.percent(each.share),
                f"{each.relative_norm:.2g}",
                console.real(each.first_loss),
                console.real(each.last_loss),
            )
            for each in result.clients
        ],
        numbers=frozenset({"round", "examples", "share", "update / model", "loss before", "loss after"}),
    )
    facts: list[tuple[str, object]] = [(result.kind.replace("-", " "), result.path)]
    if result.clients:
        facts.append(("seen by a client", f"{console.percent(result.covered)} of all parameters"))
    return [*([clients] if result.clients else []), console.Facts(facts)]
