"""What a training is measured on, and the plain loop next to it: `python -m benchmarks.training WHAT ...`.

make KIND FOLDER                     model/ and data.jsonl
plain PROXY DATA LOG BATCH STEPS     transformers and torch only; writes a JSON line a step, as client-train --log does
"""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.synthetic import SHAPES

WORDS = 30_000
LR, WEIGHT_DECAY, CLIP = 5e-5, 0.01, 1.0  # client-train's own


@dataclass(frozen=True)
class Kind:
    """A model and its batches: `batch` examples of `tokens` tokens."""

    batch: int
    tokens: int


KINDS = {"minilm": Kind(16, 64), "llama-0.1b": Kind(4, 64), "tiny": Kind(2, 8)}


def make(kind: str, folder: Path, rows: int = 256) -> None:
    """Write a model with random weights, a tokenizer of words, and data."""
    import torch

    torch.manual_seed(0)
    model = _model(kind)
    model.save_pretrained(folder / "model")
    tokenizer(model.config.vocab_size).save_pretrained(folder / "model")
    rng = random.Random(0)
    words = min(WORDS, model.config.vocab_size - 10)
    with (folder / "data.jsonl").open("w") as file:
        for row in range(rows):
            text = " ".join(f"w{rng.randrange(words)}" for _ in range(KINDS[kind].tokens))
            file.write(json.dumps({"text": text} | ({"label": row % 2} if kind != "llama-0.1b" else {})) + "\n")


def _model(kind: str) -> Any:
    import transformers

    if kind == "llama-0.1b":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPES["0.1b"].config()))
    width, layers, words = (384, 6, 30_522) if kind == "minilm" else (32, 2, 200)
    config = transformers.BertConfig(
        vocab_size=words,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        intermediate_size=4 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config)


def tokenizer(vocabulary: int) -> Any:
    """A tokenizer of words w0, w1, ..."""
    import tokenizers
    import transformers

    words = {f"w{number}": number + 3 for number in range(vocabulary - 3)} | {"<pad>": 0, "<unk>": 1, "</s>": 2}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )


def plain(proxy: str, data: str, log: str, size: int, steps: int) -> None:
    """Train everything with transformers and torch, as their documentation shows it, in fp32."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(proxy)
    model = getattr(transformers, config.architectures[0]).from_pretrained(proxy, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(proxy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    classifies = "label" in rows[0]
    model.train()
    begin = time.monotonic()
    with Path(log).open("w") as file:
        for step in range(steps):
            batch = [rows[(step * size + row) % len(rows)] for row in range(size)]
            inputs = tokenizer([row["text"] for row in batch], return_tensors="pt", padding=True)
            inputs.pop("token_type_ids", None)
            labels = torch.tensor([row["label"] for row in batch]) if classifies else inputs["input_ids"]
            loss = model(**inputs, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            file.write(json.dumps({"step": step + 1, "loss": loss.item(), "seconds": time.monotonic() - begin}) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(sys.argv[2], Path(sys.argv[3]))
    else:
        plain(*sys.argv[2:5], *map(int, sys.argv[5:7]))
