"""`fedqsn evaluate`: measure a global model, a server model, a quantized model or a proxy on labelled data."""

from __future__ import annotations

from pathlib import Path

from fedqsn_cli import validate
from fedqsn_cli.checkpoint import Checkpoint, resolve
from fedqsn_cli.models.torch_model import choose_device, load_model, memory_errors, quiet
from fedqsn_cli.progress import Progress, Silent
from fedqsn_cli.training.data import Encoder
from fedqsn_cli.training.proxies import verify_proxy
from fedqsn_cli.training.scoring import Evaluation, score
from fedqsn_cli.training.tables import read_table

__all__ = ["Evaluation", "evaluate"]


def evaluate(
    source: str | Path,
    *,
    data: str | Path,
    batch_size: int = 32,
    max_length: int = 256,
    device: str = "auto",
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a model in fp32: loss, and accuracy and macro F1 (classification) or perplexity (language models).

    Args:
        source: a path or hf:// reference to a model or proxy. A server model's scale is applied, packed weights are
            unpacked.
        data: a JSONL, CSV or Parquet file, as for client_train.
        batch_size: examples a batch; does not change the result.
        max_length: longer texts are cut to this many tokens.
        device: auto, cpu, cuda or cuda:N.
        progress: told of examples.

    Raises:
        InputError: the model cannot be used. DataError: the data cannot be used.
    """
    validate.at_least(1, batch_size, "--batch-size")
    validate.at_least(1, max_length, "--max-length")
    progress = progress or Silent()
    place = choose_device(device)
    table = read_table(data)
    found = resolve(str(source))
    with Checkpoint.open(found.path) as checkpoint, quiet(), memory_errors():
        if checkpoint.proxy_manifest is not None:
            verify_proxy(found.path)
        loaded = load_model(checkpoint)
        encoder = Encoder.of(loaded, max_length)
        examples = encoder.encode(table, progress)
        model = loaded.model.to(place)
        return score(model, examples, batch_size=batch_size, padding=encoder.padding, progress=progress)
