"""Rows with labels: numbers, sets of labels, labels of words, and what of them is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqsn_cli.errors import DataError, InputError
from fedqsn_cli.progress import Silent
from fedqsn_cli.training.data.encoder import Encoder
from fedqsn_cli.training.data.examples import IGNORED, Examples
from fedqsn_cli.training.data.tables import Table
from support.scenario import few
from support.tokenizers import KINDS, tokenizer

INPUTS = frozenset({"input_ids", "attention_mask"})
LABELS = {"O": 0, "B-x": 1, "I-x": 2}


def encoder(task: Any, kind: str = "byte-level", **options: Any) -> Encoder:
    fields = {"label_ids": LABELS, "labels": 3, "max_length": 64, "positions": 1024, "vocabulary": 10**6, **options}
    return Encoder(task=task, tokenizer=tokenizer(kind), inputs=INPUTS, **fields)


def encode(given: Encoder, **columns: list[Any]) -> Examples:
    rows = len(next(iter(columns.values())))
    return given.encode(Table(Path("data.jsonl"), columns, tuple(columns), rows), Silent())


def test_a_number_is_a_number_or_its_text() -> None:
    labels = [1, -2.5, "3", " 4e-1 ", "[5]", [6]]
    examples = encode(encoder("regression", labels=1), text=["fox"] * 6, label=labels)
    assert examples.targets == [[1.0], [-2.5], [3.0], [0.4], [5.0], [6.0]]


@pytest.mark.parametrize("label", ["many", "", None, True, "nan", "1e99", 10**400, {}, [], [1, 2], "[1", "0x10", "1_0"])
def test_what_is_no_number_is_refused_with_its_row(label: object) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl: row 2: column 'label'"):
        encode(encoder("regression", labels=1), text=["fox", "dog"], label=[1, label])


def test_labels_of_a_text_are_a_list_of_names_or_numbers() -> None:
    labels: list[Any] = [[], ["I-x"], [0, "B-x"], '["O"]', "[1, 2]"]
    examples = encode(encoder("multi-label"), text=["fox"] * 5, label=labels)
    assert examples.targets == [[0, 0, 0], [0, 0, 1], [1, 1, 0], [1, 0, 0], [0, 1, 1]]


@pytest.mark.parametrize(
    ("label", "complaint"),
    [
        ("O", "holds text, not a list"),
        (None, "holds nothing, not a list"),
        ([3], "label 3 is out of range"),
        (["other"], "'other' is not a label of the model"),
        ([0, 1, 0], "0 is given twice; list the labels that a text has"),
    ],
)
def test_sets_that_cannot_be_used_are_refused(label: object, complaint: str) -> None:
    with pytest.raises(DataError, match=rf"row 1: column 'label'.*{complaint}"):
        encode(encoder("multi-label"), text=["fox"], label=[label])


WORDS = st.lists(st.text("helo wrd2é世-".replace(" ", ""), min_size=1, max_size=6), min_size=1, max_size=6)


@few(60)
@given(kind=st.sampled_from(KINDS), words=WORDS)
def test_the_first_token_of_every_word_counts_and_no_other(kind: str, words: list[str]) -> None:
    given = encoder("token-classification", kind)
    tags = [place % 3 for place in range(len(words))]
    examples = encode(given, tokens=[words], tags=[tags])
    ids, targets = examples.features[0]["input_ids"], examples.targets[0]
    assert ids == given.tokenizer(" ".join(words))["input_ids"]
    assert [one for one in targets if one != IGNORED] == tags


def test_words_that_were_cut_off_do_not_count() -> None:
    given = encoder("token-classification", max_length=3)
    examples = encode(given, tokens=[["hello", "world", "fox"], ["hello"]], tags=[["O", "B-x", "I-x"], ["B-x"]])
    assert examples.cut == 1
    assert [[one for one in row if one != IGNORED] for row in examples.targets] == [[0, 1], [1]]


@pytest.mark.parametrize(
    ("words", "tags", "complaint"),
    [
        (["fox", "dog"], ["O"], "2 tokens have 1 tags"),
        (["fox", 3], ["O", "O"], "column 'tokens': token 2 holds a number"),
        (["fox", " "], ["O", "O"], "column 'tokens': token 2 holds no character"),
        (["fox", "a\ud800"], ["O", "O"], r"column 'tokens' holds U\+D800"),
        (["fox"], ["noun"], "column 'tags': 'noun' is not a label"),
        ("fox", "O", "column 'tokens' holds text, not a list"),
    ],
)
def test_words_that_cannot_be_used_are_refused(words: Any, tags: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=rf"data\.jsonl: row 1: {complaint}"):
        encode(encoder("token-classification"), tokens=[words], tags=[tags])


def test_a_tokenizer_without_offsets_is_refused_for_words() -> None:
    given = encoder("token-classification")
    slow = type("Slow", (), {"is_fast": False, "name_or_path": "slow"})()
    with pytest.raises(InputError, match="does not tell which word a token belongs to"):
        encode(Encoder(**{**_fields(given), "tokenizer": slow}), tokens=[["fox"]], tags=[["O"]])


def _fields(given: Encoder) -> dict[str, Any]:
    return {name: getattr(given, name) for name in Encoder.__dataclass_fields__}
