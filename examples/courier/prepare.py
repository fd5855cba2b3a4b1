"""Write a small model and everybody's data, so that nothing is needed from a network: prepare.py FOLDER CLIENT..."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

TOPICS = ("business", "sports", "tech")
WORDS = {topic: [f"{topic}{number}" for number in range(12)] for topic in TOPICS}


def write_model(folder: Path) -> None:
    """A BERT of two narrow layers that has learnt nothing yet."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(word for words in WORDS.values() for word in words)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        label2id={topic: number for number, topic in enumerate(TOPICS)},
        id2label=dict(enumerate(TOPICS)),
    )
    BertForSequenceClassification(config).save_pretrained(folder)


def write_texts(path: Path, seed: int, count: int = 240) -> None:
    """Texts of twenty words, each labelled with its topic."""
    draw = random.Random(seed)
    topics = [TOPICS[number % len(TOPICS)] for number in range(count)]
    rows = ({"text": " ".join(draw.choices(WORDS[topic], k=20)), "label": topic} for topic in topics)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """Write global/, dev.jsonl, and CLIENT.jsonl for every client."""
    folder = Path(sys.argv[1])
    write_model(folder / "global")
    for seed, name in enumerate(["dev", *sys.argv[2:]]):
        write_texts(folder / f"{name}.jsonl", seed)


if __name__ == "__main__":
    main()
