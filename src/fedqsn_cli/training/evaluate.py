"""`fedqsn evaluate`: measure a global model, a server model, a quantized model or a proxy on labelled data."""

from __future__ import annotations

from pathlib import Path

from fedqsn_cli.artifacts.proxy_folder import verify_proxy
from fedqsn_cli.checkpoint import Checkpoint, resolve
from fedqsn_cli.models.torch_model import choose_device, load_model, memory_errors, quiet
from fedqsn_cli.options import EvaluateOptions
from fedqsn_cli.progress import SILENT, Progress
from fedqsn_cli.training.data import Encoder
from fedqsn_cli.training.scoring import Evaluation, score
from fedqsn_cli.training.tables import read_table

__all__ = ["Evaluation", "evaluate"]


def evaluate(source: str | Path, options: EvaluateOptions, *, progress: Progress = SILENT) -> Evaluation:
    """Measure a model in fp32: loss, and accuracy and macro F1 (classification) or perplexity (language models).

    Args:
        source: a path or hf:// reference to a model or proxy. A server model's rescale factor is applied, packed
            weights are unpacked.
        options: see `EvaluateOptions`.
        progress: receives the number of examples done, with the loss.

    Raises:
        InputError: the model cannot be used. DataError: the data cannot be used.

    Example:
        >>> evaluate("global/", data="dev.jsonl").loss
    """
    device = choose_device(options.device)
    table = read_table(options.data)
    folder = resolve(str(source)).path
    with Checkpoint.open(folder) as checkpoint, quiet(), memory_errors():
        if checkpoint.proxy_manifest is not None:
            verify_proxy(folder)
        loaded = load_model(checkpoint)
        encoder = Encoder.of(loaded, options.max_length)
        examples = encoder.encode(table, progress)
        model = loaded.model.to(device)
        return score(model, examples, batch_size=options.batch_size, padding=encoder.padding, progress=progress)
