"""`fedqsn mask`."""

from __future__ import annotations

from typing import Annotated

from fedqsn_cli import console, text
from fedqsn_cli.cli import options


def mask(
    checkpoint: Annotated[str, options.argument("CHECKPOINT", text=f"The global model: {options.REFERENCE}.")],
    out: options.Out,
    key: Annotated[str, options.file("--key", text="The job's secret; made if there is none.", panel=options.MASKING)],
    p1: options.P1 = None,
    axis: options.Axis = None,
    where: options.Where = None,
    layers: options.Layers = None,
    p1_schedule: options.P1Schedule = None,
    preset: options.Preset = None,
    plan: options.Plan = None,
    rescale: options.Rescale = None,
    fill: options.Fill = None,
    public_base: options.PublicBaseRecord = None,
    client: Annotated[
        str | None,
        options.name("--client", text="Mask a server model for this client.", panel=options.CLIENT),
    ] = None,
    round_number: Annotated[
        int | None,
        options.count("--round", text="Number of the round.", panel=options.CLIENT, least=0),
    ] = None,
    p2: Annotated[
        float | None,
        options.ratio("--p2", text="Share of the visible neurons to hide from the client.", panel=options.CLIENT),
    ] = None,
    schedule: Annotated[options.Schedule | None, options.schedule(options.CLIENT)] = None,
    max_shard_size: options.ShardSize = "5GB",
    force: options.Force = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Hide a random set of neurons of a model.

    A global model becomes the server model. The key decides what is hidden, and nothing else does. It is made, readable
    by you alone, when there is none; a key stands for one job: one p1, one plan, one hidden set. Weights that stay
    visible keep their values bit for bit.

    With --where and --layers only a part of the model is hidden; the rest is quantized later, but in the clear.
    --p1-schedule hides more of some layers than of others.

    With --client, a server model (plain or quantized) becomes what one client would get, without the manifest of a
    proxy: the last step of a proxy made by hand. 'fedqsn export-proxy' does all steps at once.

    Examples:

      fedqsn mask global/ --out server/ --p1 0.1 --key job.key
      fedqsn mask hf://owner/model --out server/ --p1 0.5 --key job.key \\
          --fill base --public-base hf://owner/base
      fedqsn mask global/ --out server/ --p1 0.1 --key job.key --where outputs \\
          --layers embeddings,0-5 --p1-schedule 0-2=0.9,3-5=0.5
      fedqsn mask hf://owner/model --out server/ --key job.key --preset strong --public-base hf://owner/base
      fedqsn mask server-nf4/ --out masked/ --client alice --round 1 --p2 0.1 --key job.key
    """
    how = console.view(as_json, quiet)
    from fedqsn_cli import mask as run
    from fedqsn_cli.cli import tables

    with console.progress(how) as progress:
        result = run(
            checkpoint,
            out,
            key=key,
            p1=p1,
            axis=axis,
            where=where,
            layers=layers,
            p1_schedule=p1_schedule,
            preset=preset,
            plan=plan,
            rescale=rescale,
            fill=fill,
            public_base=public_base,
            client=client,
            round=round_number,
            p2=p2,
            schedule=schedule,
            max_shard_size=max_shard_size,
            force=force,
            progress=progress,
        )
    facts = console.Facts(
        [
            (result.kind.replace("-", " "), result.path),
            (
                "hidden",
                f"{text.percent(result.hidden)} of all parameters, {text.number(result.groups)} groups of units",
            ),
            ("public base", tables.public_base(result.public_base)),
            ("new key", f"{key}: keep it secret, and keep it" if result.key_created else None),
        ]
    )
    console.show(how, result, essential=[result.path], parts=[facts])
