"""What pages and quickstart take for granted, in tiny: encoders, and articles about three topics."""

from __future__ import annotations

import json
from pathlib import Path

TOPICS = ("business", "sports", "tech")
WORDS = {topic: [f"{topic}{number}" for number in range(12)] for topic in TOPICS}


def write_encoder(folder: Path, head: bool, seed: int = 0) -> None:
    """A BERT of two narrow layers whose vocabulary is that of the tiny articles."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(word for words in WORDS.values() for word in words)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(seed)
    labels = {"label2id": {topic: i for i, topic in enumerate(TOPICS)}, "id2label": dict(enumerate(TOPICS))}
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        **(labels if head else {}),
    )
    (BertForSequenceClassification if head else BertModel)(config).save_pretrained(folder)


def article(topic: str, number: int) -> str:
    """Twenty words of a topic, in an order that no other article shares."""
    return " ".join(WORDS[topic][(number * 7 + step * (number % 5 + 1) + step // 12) % 12] for step in range(20))


def write_articles(folder: Path, each: int) -> None:
    for topic in TOPICS:
        (folder / topic).mkdir(parents=True)
        for number in range(each):
            text = f"{topic} title {number}\n\n{article(topic, number)} number{number} of {topic} £{number}"
            (folder / topic / f"{number:03}.txt").write_bytes(text.encode("latin-1"))


def write_rows(path: Path, count: int) -> None:
    rows = [{"text": article(TOPICS[i % 3], i), "label": TOPICS[i % 3]} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
