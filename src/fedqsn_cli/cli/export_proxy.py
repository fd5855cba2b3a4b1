"""`fedqsn export-proxy`."""

from __future__ import annotations

from typing import Annotated

from fedqsn_cli import console, text, validate
from fedqsn_cli.cli import options


def export_proxy(
    checkpoint: Annotated[
        str,
        options.argument("CHECKPOINT", text="The global model, the server model, or the quantized server model."),
    ],
    out: Annotated[
        str,
        options.file(
            "--out",
            text="Folder to write; {client} in it stands for the client's name.",
            panel=options.OUTPUT,
            metavar="DIR",
        ),
    ],
    client: Annotated[
        list[str],
        options.name("--client", text="Name of a client; give it again for more clients.", panel=options.JOB),
    ],
    round_number: Annotated[int, options.count("--round", text="Number of the round.", panel=options.JOB, least=0)],
    key: Annotated[str, options.file("--key", text="The job's secret; made if there is none.", panel=options.JOB)],
    ledger: Annotated[str, options.file("--ledger", text="Record of all releases, added to.", panel=options.JOB)],
    p2: Annotated[
        float,
        options.ratio("--p2", text="Share of the visible neurons to hide from each client.", panel=options.MASKING),
    ],
    p1: options.P1 = None,
    schedule: Annotated[options.Schedule | None, options.schedule(options.MASKING)] = None,
    axis: options.Axis = None,
    where: options.Where = None,
    layers: options.Layers = None,
    p1_schedule: options.P1Schedule = None,
    preset: options.Preset = None,
    plan: options.Plan = None,
    rescale: options.Rescale = None,
    fill: options.Fill = None,
    public_base: options.PublicBaseRecord = None,
    train: Annotated[
        options.Train | None,
        options.option(
            "--train",
            text="What clients train: visible neurons, or all, those of the public base in the holes too.",
            panel=options.MASKING,
            show_default="the preset's, else visible",
        ),
    ] = None,
    number_format: Annotated[
        options.Format | None, options.number_format(show_default="the server model's, else nf4")
    ] = None,
    block_size: Annotated[int | None, options.block_size(show_default="the server model's, else 64")] = None,
    double_quant: options.DoubleQuant = False,
    layout: options.Layout = None,
    budget: Annotated[
        float | None,
        options.real(
            "--budget",
            text="Refuse if a client would then have seen more than this share of all parameters.",
            panel=options.LIMITS,
            check=validate.up_to_one,
        ),
    ] = None,
    coalition: Annotated[
        int | None,
        options.count("--coalition", text="Refuse if so many clients together would have.", panel=options.LIMITS),
    ] = None,
    push: Annotated[
        str | None,
        options.file(
            "--push",
            text="Upload to this private repository when the proxy is complete; may hold {client} too.",
            panel=options.OUTPUT,
            metavar="hf://OWNER/NAME",
        ),
    ] = None,
    max_shard_size: options.ShardSize = "5GB",
    force: options.Force = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Make what clients get, and record the release.

    A global model is masked, quantized, and masked again for each client; a server model starts further down. A proxy
    holds no hidden weight and nothing about the key, and is an ordinary Hugging Face model folder. The model is read
    and quantized once, however many clients there are. The same export run again gives the same bytes and no second
    line in the ledger.

    With --budget, a release that would show a client (or, with --coalition, so many clients together) too much of the
    model over all rounds is refused before anything is written; the exit code is 1 then.

    With --where and --layers only a part of the model is hidden; the rest is in the clear, but quantized. A preset sets
    several options at once: paper hides as the method's authors did, strong hides as much as a public base allows.

    With --train all (and a public base in the holes) clients train what stands in the holes, too, and what they
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
    how = console.view(as_json, quiet)
    from fedqsn_cli import export_proxy as run
    from fedqsn_cli.cli import tables

    with console.progress(how) as progress:
        result = run(
            checkpoint,
            out,
            client=client,
            round=round_number,
            key=key,
            ledger=ledger,
            p1=p1,
            p2=p2,
            schedule=schedule,
            axis=axis,
            where=where,
            layers=layers,
            p1_schedule=p1_schedule,
            preset=preset,
            plan=plan,
            budget=budget,
            coalition=coalition,
            rescale=rescale,
            fill=fill,
            public_base=public_base,
            train=train,
            format=number_format,
            block_size=block_size,
            double_quant=double_quant or None,
            layout=layout,
            push=push,
            max_shard_size=max_shard_size,
            force=force,
            progress=progress,
        )
    proxies = console.Table(
        ("client", "proxy", "size", "id"),
        [(each.client, each.path, text.size(each.bytes), each.proxy_id[:12]) for each in result.proxies],
        numbers=frozenset({"size"}),
    )
    facts: list[tuple[str, object]] = [
        ("quantization", tables.quantization(result.quantization)),
        ("hidden by the server", text.percent(result.hidden_by_server)),
        ("hidden from a client", text.percent(result.hidden_from_client)),
        *tables.shares(result.shares),
        ("public base", tables.public_base(result.public_base)),
        ("pushed", ", ".join(each.pushed for each in result.proxies if each.pushed) or None),
        ("new key", f"{key}: keep it secret, and keep it" if result.key_created else None),
    ]
    essential = [each.path for each in result.proxies]
    console.show(how, result, essential=essential, parts=[proxies, console.Facts(facts)])
