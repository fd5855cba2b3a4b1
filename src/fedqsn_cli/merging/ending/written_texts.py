"""Texts that a language model writes itself, sampled from its own distribution: what it is then asked about."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedqsn_cli.models.torch_model import Loaded
from fedqsn_cli.options import ConsolidateOptions
from fedqsn_cli.progress import SILENT, Progress
from fedqsn_cli.training.data.encoder import Encoder
from fedqsn_cli.training.data.tables import Rows
from fedqsn_cli.training.steps.batching import IGNORED, Examples
from fedqsn_cli.training.steps.precision import repeatable


def written_texts(
    loaded: Loaded, encoder: Encoder, begun_like: Rows | None, options: ConsolidateOptions, progress: Progress
) -> Examples:
    """As many texts as the options say, each begun with the first tokens of a text that is given.

    Args:
        loaded: a language model, on its device.
        begun_like: the texts that are given; None: the first tokens are drawn.
    """
    starts = _starts(loaded, encoder, begun_like, options)
    length = min(options.written_length, encoder.max_length)
    rows: list[list[int]] = []
    progress.start("writing texts", options.written_examples, "texts")
    device = loaded.model.device
    with repeatable(device, options.seed), torch.inference_mode():
        for first in range(0, options.written_examples, options.batch_size):
            count = min(options.batch_size, options.written_examples - first)
            begun = torch.tensor([starts[(first + n) % len(starts)] for n in range(count)], device=device)
            rows += _continued(loaded.model, begun, length).tolist()
            progress.advance(count)
    progress.finish()
    features = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    kept = [{name: value for name, value in one.items() if name in loaded.inputs} for one in features]
    return Examples("causal-lm", kept, [[IGNORED, *row[1:]] for row in rows])


def _starts(loaded: Loaded, encoder: Encoder, begun_like: Rows | None, options: ConsolidateOptions) -> list[list[int]]:
    """The first tokens of the given texts, a special one and the next; without texts any tokens."""
    special = set(loaded.tokenizer.all_special_ids)
    if begun_like is None:
        generator = torch.Generator().manual_seed(options.seed % 2**63)
        ids = torch.randint(loaded.vocabulary, (options.written_examples,), generator=generator).tolist()
        return [[token] for token in ids if token not in special] or [[0]]
    texts = [feature["input_ids"] for feature in encoder.encode(begun_like, SILENT).features]
    leads = sum(ids[0] in special for ids in texts) * 2 > len(texts)
    return [ids[: 2 if leads else 1] for ids in texts if len(ids) > 1 and (ids[0] in special) == leads]


def _continued(model: Any, begun: Tensor, length: int) -> Tensor:
    """Texts of `length` tokens that a model writes, sampled from its own distribution, int64 [texts, length]."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=length - begun.shape[1],
        max_new_tokens=length - begun.shape[1],
        pad_token_id=0,
        eos_token_id=None,
    )
    written: Tensor = model.generate(begun, attention_mask=torch.ones_like(begun), generation_config=config)
    return written
