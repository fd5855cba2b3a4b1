"""How many texts a tokenizer is given at a time."""

from __future__ import annotations

import pytest

from fedqsn_cli.progress import SILENT
from fedqsn_cli.training import tokenizing
from fedqsn_cli.training.tokenizing import chunks


def test_texts_are_tokenized_in_parts_that_memory_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "_CHUNK", 3)
    monkeypatch.setattr(tokenizing, "_CHARACTERS", 10)
    short, long = ["a"] * 7, ["a", "b" * 8, "c" * 99, "d", "e" * 11, "f", ""]
    assert list(chunks(7, SILENT)) == list(chunks(7, SILENT, [short])) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert list(chunks(7, SILENT, [long])) == [slice(0, 3), slice(3, 5), slice(5, 7)]
    assert list(chunks(7, SILENT, [short, long])) == [slice(0, 2), slice(2, 3), slice(3, 5), slice(5, 7)]
    assert list(chunks(0, SILENT, [[]])) == []
