"""`fedqsn mask`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fedqsn_cli import console, text
from fedqsn_cli.cli.command import MODEL, argument

if TYPE_CHECKING:
    from fedqsn_cli.cli.views import ViewOptions
    from fedqsn_cli.options import MaskOptions


def mask(
    checkpoint: Annotated[str, argument("CHECKPOINT", f"The global model: {MODEL}.")],
    options: MaskOptions,
    view: ViewOptions,
) -> None:
    """Hide a random set of neurons of a model.

    A global model becomes the server model. The key alone decides what is hidden. A missing key is created, readable by
    you only; it belongs to one job: one p1, one plan, one hidden set. Weights that stay visible keep their values bit
    for bit.

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
    from fedqsn_cli.cli import tables
    from fedqsn_cli.export.server_model import mask as run

    with console.progress(view.mode) as progress:
        result = run(checkpoint, options, progress=progress)
    facts = console.Facts(
        [
            (result.kind.replace("-", " "), result.path),
            (
                "hidden",
                f"{text.percent(result.hidden)} of all parameters, {text.number(result.groups)} groups of units",
            ),
            ("public base", tables.public_base(result.public_base)),
            ("new key", f"{options.key}: keep it secret, and keep it" if result.key_created else None),
        ]
    )
    console.show(view.mode, result, essential=[result.path], parts=[facts])
