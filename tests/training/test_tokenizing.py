"""How many texts a tokenizer is given at a time, and how much memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedqsn_cli.progress import SILENT
from fedqsn_cli.training.data import tokenizing
from fedqsn_cli.training.data.encoder import Encoder
from fedqsn_cli.training.data.tables import Table
from fedqsn_cli.training.data.tokenizing import chunks
from support.tokenizers import tokenizer


@pytest.fixture(autouse=True)
def tokenizers_in_place() -> None:
    """Nothing: a text is tokenized in a process with limits."""


def test_texts_are_tokenized_in_parts_that_memory_can_hold() -> None:
    def parts(rows: int, *texts: list[str]) -> list[slice]:
        return list(chunks(rows, SILENT, texts, most_rows=3, most_characters=10))

    short, long = ["a"] * 7, ["a", "b" * 8, "c" * 99, "d", "e" * 11, "f", ""]
    assert parts(7) == parts(7, short) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert parts(7, long) == [slice(0, 3), slice(3, 5), slice(5, 7)]
    assert parts(7, short, long) == [slice(0, 2), slice(2, 3), slice(3, 5), slice(5, 7)]
    assert parts(0, []) == []


@pytest.mark.parametrize("kind", ["byte-level", "unigram"])
def test_one_long_text_is_given_the_memory_that_it_takes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "MEMORY", 1 << 24)
    encoder = Encoder(
        *("causal-lm", tokenizer(kind), frozenset({"input_ids"})),
        **{"vocabulary": 1000, "label_ids": {}, "labels": 0, "max_length": 16, "positions": 16},
    )
    table = Table(Path("long.jsonl"), {"text": ["q#" * 200_000]}, ("text",), 1)
    assert list(encoder.encode(table, SILENT).lengths) == [16]
