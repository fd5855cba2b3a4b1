"""`fedqsn evaluate`: measure a global model, a server model, a quantized model or a proxy on labelled data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedqsn_cli.artifacts.proxy_folder import verify_proxy
from fedqsn_cli.checkpoint import Checkpoint, resolve
from fedqsn_cli.models.messages import quiet
from fedqsn_cli.models.torch_model import choose_device, load_model, memory_errors
from fedqsn_cli.options import EvaluateOptions
from fedqsn_cli.progress import SILENT, Progress
from fedqsn_cli.training.data.data_files import open_data
from fedqsn_cli.training.data.encoder import Encoder
from fedqsn_cli.training.scoring.generation import Prompts, measure_texts, require_libraries
from fedqsn_cli.training.scoring.scoring import Evaluation, score

__all__ = ["Evaluation", "evaluate"]


def evaluate(source: str | Path, options: EvaluateOptions, *, progress: Progress = SILENT) -> Evaluation:
    """Measure a model in fp32: its loss, and the measures of its task.

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
    if options.generate:
        require_libraries()
    device = choose_device(options.device)
    data = open_data(options.data)
    folder = resolve(str(source)).path
    with Checkpoint.open(folder) as checkpoint, quiet(), memory_errors():
        if checkpoint.proxy_manifest is not None:
            verify_proxy(folder)
        loaded = load_model(checkpoint)
        encoder = Encoder.of(loaded, options.max_length)
        prompts = Prompts.of(encoder, data.table(), options.answer_tokens) if options.generate else None
        examples = encoder.encode(data, progress)
        loaded.model.to(device)
        result = score(
            loaded.model, examples, batch_size=options.batch_size, padding=encoder.padding, progress=progress
        )
        if prompts is None:
            return result
        return replace(result, **measure_texts(loaded.model, encoder, prompts, options, progress))
