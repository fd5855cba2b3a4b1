"""Rows with labels: sequence classification, regression, several labels a text, a label a word."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from fedqsn_cli.errors import InputError
from fedqsn_cli.progress import Progress
from fedqsn_cli.text import listed
from fedqsn_cli.training.examples import IGNORED, Examples, Ids
from fedqsn_cli.training.tables import Table, type_name
from fedqsn_cli.training.tokenizing import Encoding

_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")

Target = Callable[[int, Any], Any]
"""Takes the number of a row and the value of its label; returns the target."""


def classes(encoding: Encoding, table: Table, progress: Progress) -> Examples:
    """`label` is a label of the model, or its number."""
    return _sequences(encoding, table, progress, lambda row, value: label_id(encoding, table, row, value, "label"))


def amounts(encoding: Encoding, table: Table, progress: Progress) -> Examples:
    """`label` is a number, or a list of as many as the model has outputs."""
    return _sequences(encoding, table, progress, lambda row, value: _amounts(encoding, table, row, value))


def sets(encoding: Encoding, table: Table, progress: Progress) -> Examples:
    """`label` is a list of all labels that the text has."""

    def flags(row: int, value: Any) -> list[float]:
        return _flags(encoding, table, row, table.listed("label", row, value))

    return _sequences(encoding, table, progress, flags)


def _sequences(encoding: Encoding, table: Table, progress: Progress, target: Target) -> Examples:
    table.require("text", "label", why=f"{encoding.task} needs text and label, and takes text_pair")
    targets = [target(row, value) for row, value in enumerate(table.values("label"))]
    columns = ("text", "text_pair") if "text_pair" in table.columns else ("text",)
    features, cut = encoding.features(table, progress, *columns)
    for row, feature in enumerate(features):
        if not feature["input_ids"]:
            blank = not any(table.columns[column][row].strip() for column in columns)
            raise table.error("the text is empty" if blank else "the tokenizer finds no token in the text", row=row)
        if encoding.end is not None and feature["input_ids"].count(encoding.end) != 1:
            what = (
                f"the text has {feature['input_ids'].count(encoding.end)} end-of-text tokens, where the model needs 1"
            )
            raise table.error(what, row=row)
    return Examples(encoding.task, features, targets, cut=len(cut))


def label_id(encoding: Encoding, table: Table, row: int, value: object, column: str) -> int:
    """Class id of a label: by its name in the model's config, else by its number."""
    if type(value) is str and value in encoding.label_ids:
        number = encoding.label_ids[value]
    elif type(value) is int:
        number = value
    elif type(value) is str and re.fullmatch(r"\s*\d{1,9}\s*", value):
        number = int(value)
    else:
        shown = repr(value)[:60] if isinstance(value, (str, float, bool)) else type_name(value)
        hint = f"its labels are {listed(list(encoding.label_ids), 8)}, or their numbers"
        raise table.error(f"column {column!r}: {shown} is not a label of the model", row=row, hint=hint)
    if not 0 <= number < encoding.labels:
        hint = f"the model has labels 0 to {encoding.labels - 1}"
        raise table.error(f"column {column!r}: label {number} is out of range", row=row, hint=hint)
    return number


def _amounts(encoding: Encoding, table: Table, row: int, value: Any) -> list[float]:
    several = isinstance(value, list) or (type(value) is str and value.lstrip().startswith("["))
    parts = table.listed("label", row, value) if several else [value]
    found = [_amount(table, row, part) for part in parts]
    if len(found) != encoding.labels:
        what = f"column 'label' holds {len(found)} numbers, but the model has {encoding.labels} outputs"
        raise table.error(what, row=row)
    return found


def _amount(table: Table, row: int, value: Any) -> float:
    number = math.nan
    if type(value) in (int, float) or (type(value) is str and _NUMBER.fullmatch(value)):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    if not math.isfinite(number) or abs(number) > 3e38:
        shown = repr(value)[:60] if isinstance(value, (str, int, float)) else type_name(value)
        raise table.error(f"column 'label' holds {shown}, which is not a number of single precision", row=row)
    return number


def _flags(encoding: Encoding, table: Table, row: int, value: list[Any]) -> list[float]:
    flags = [0.0] * encoding.labels
    for part in value:
        number = label_id(encoding, table, row, part, "label")
        if flags[number]:
            hint = "list the labels that a text has, not 0 and 1 for each of them"
            raise table.error(f"column 'label': {part!r} is given twice", row=row, hint=hint)
        flags[number] = 1.0
    return flags


def tags(encoding: Encoding, table: Table, progress: Progress) -> Examples:
    """`tokens` is a list of words, `tags` one of as many labels: the first token of a word counts.

    The words are joined by spaces, so that the model sees the text that it would see without them.
    """
    table.require("tokens", "tags", why="token classification needs tokens and tags, one list of each in a row")
    if not encoding.tokenizer.is_fast:
        raise InputError("the tokenizer does not tell which word a token belongs to", hint="add its tokenizer.json")
    words, labels = table.lists("tokens"), table.lists("tags")
    for row in range(table.rows):
        _check_words(table, row, words[row], labels[row])
    targets = [[label_id(encoding, table, row, one, "tags") for one in part] for row, part in enumerate(labels)]
    texts = [" ".join(part) for part in words]
    tokens, cut = encoding.tokens(table, progress, [texts], ["tokens"], **encoding.with_offsets)
    spread = [_spread(one, words[row], targets[row]) for row, one in enumerate(tokens)]
    kept = [row for row, part in enumerate(spread) if any(one != IGNORED for one in part)]
    features = [encoding.selected(tokens[row]) for row in kept]
    return Examples(encoding.task, features, [spread[row] for row in kept], table.rows - len(kept), cut=len(cut))


def _check_words(table: Table, row: int, words: list[Any], labels: list[Any]) -> None:
    """Raise DataError for words that are not text, or that are not as many as their labels."""
    if len(words) != len(labels):
        raise table.error(f"{len(words)} tokens have {len(labels)} tags", row=row)
    for number, word in enumerate(words, 1):
        if type(word) is not str or not word.strip():
            shown = "no character" if type(word) is str else type_name(word)
            raise table.error(f"column 'tokens': token {number} holds {shown}", row=row)
        table.check_characters("tokens", row, word)


def _spread(tokens: dict[str, Any], words: list[str], labels: Ids) -> Ids:
    """A target for each token of a text: the label of the word that it is the first token of."""
    spread = [IGNORED] * len(tokens["input_ids"])
    places = list(zip(tokens["offset_mapping"], tokens["special_tokens_mask"], strict=True))
    position = start = 0
    for word, label in zip(words, labels, strict=True):
        while position < len(places) and (places[position][1] or places[position][0][1] <= start):
            position += 1
        if position < len(places) and places[position][0][0] < start + len(word) and spread[position] == IGNORED:
            spread[position] = label
        start += len(word) + 1
    return spread
