"""`fedqsn quantize`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fedqsn_cli import console
from fedqsn_cli.cli.command import MODEL, argument

if TYPE_CHECKING:
    from fedqsn_cli.cli.views import ViewOptions
    from fedqsn_cli.options import QuantizeOptions


def quantize(
    checkpoint: Annotated[str, argument("CHECKPOINT", f"A model: {MODEL}.")],
    options: QuantizeOptions,
    view: ViewOptions,
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
    from fedqsn_cli.cli import tables
    from fedqsn_cli.export.server_model import quantize as run

    with console.progress(view.mode) as progress:
        result = run(checkpoint, options, progress=progress)
    facts: list[tuple[str, object]] = [
        ("quantized model", result.path),
        ("quantization", tables.quantization(result.quantization)),
        *tables.shares(result.shares),
    ]
    console.show(view.mode, result, essential=[result.path], parts=[console.Facts(facts)])
