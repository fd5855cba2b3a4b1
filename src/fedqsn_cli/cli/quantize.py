"""`fedqsn quantize`."""

from __future__ import annotations

from typing import Annotated

from fedqsn_cli import console
from fedqsn_cli.cli import options


def quantize(
    checkpoint: Annotated[str, options.argument("CHECKPOINT", text=f"A model: {options.REFERENCE}.")],
    out: options.Out,
    number_format: Annotated[options.Format, options.number_format()],
    block_size: Annotated[int, options.block_size()] = 64,
    double_quant: options.DoubleQuant = False,
    layout: options.Layout = None,
    plan: options.Plan = None,
    max_shard_size: options.ShardSize = "5GB",
    force: options.Force = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Quantize a model block by block, as clients will see it.

    nf4, fp4 and int8 are written as bitsandbytes stores them, so that transformers opens the result like any
    pre-quantized model. nf3 and nf2 hide more; they, and tensors that bitsandbytes cannot hold (embeddings, heads), are
    rounded to the format's grid and stored as ordinary tensors.

    Examples:

      fedqsn quantize server/ --out server-nf4/ --format nf4
      fedqsn quantize server/ --out server-nf4/ --format nf4 --block-size 128 --double-quant
      fedqsn quantize server/ --out server-nf3/ --format nf3
    """
    how = console.view(as_json, quiet)
    from fedqsn_cli import quantize as run
    from fedqsn_cli.cli import tables

    with console.progress(how) as progress:
        result = run(
            checkpoint,
            out,
            format=number_format,
            block_size=block_size,
            double_quant=double_quant,
            layout=layout,
            plan=plan,
            max_shard_size=max_shard_size,
            force=force,
            progress=progress,
        )
    facts = [("quantized model", result.path), ("quantization", tables.quantization(result.quantization))]
    console.show(how, result, essential=[result.path], parts=[console.Facts(facts + tables.shares(result.shares))])
