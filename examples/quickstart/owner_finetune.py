"""Fine-tune the public base on the owner's own articles: the secret that the rest of the quickstart protects.

    python owner_finetune.py --base work/base --data work/data/owner.jsonl --out work/owner

This happens on the owner's side and does not use fedqsn: a plain training loop, then a plain checkpoint.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def finetune(
    base: Path, data: Path, out: Path, *, epochs: int, lr: float, batch_size: int, max_length: int, seed: int
) -> None:
    """Train all weights with AdamW, the learning rate falling linearly to zero; write `out` as safetensors."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)  # dropout
    shuffler = random.Random(seed)
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    steps = epochs * -(-len(rows) // batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)

    for epoch in range(epochs):
        shuffler.shuffle(rows)
        losses = []
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            texts = [row["text"] for row in batch]
            tokens = tokenizer(texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
            labels = torch.tensor([model.config.label2id[row["label"]] for row in batch])
            loss = model(**tokens, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        print(f"owner: epoch {epoch + 1} of {epochs}, mean loss {sum(losses) / len(losses):.3f}", flush=True)

    save(out, model, tokenizer)


def save(out: Path, *parts: Any) -> None:
    """Write a checkpoint next to `out`, then rename it: `out` is complete from the moment it exists."""
    unfinished = out.with_name(f"{out.name}.unfinished")
    for part in parts:
        part.save_pretrained(unfinished)
    unfinished.rename(out)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fine-tune the public base on the owner's own articles.")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.out.exists():
        raise SystemExit(f"{options.out} already exists; remove it to train again")
    finetune(**vars(options))


if __name__ == "__main__":
    main()
