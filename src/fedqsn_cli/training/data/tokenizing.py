"""Texts to token ids, for one model; a row that cannot be tokenized is named."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from fedqsn_cli.errors import DataError
from fedqsn_cli.models.architecture import Task
from fedqsn_cli.models.child_process import MEMORY, in_child
from fedqsn_cli.models.messages import first_line
from fedqsn_cli.progress import Progress
from fedqsn_cli.training.data.examples import Ids
from fedqsn_cli.training.data.tables import Table

SECONDS, SECONDS_A_ROW = 10, 0.05  # of processor time for all that tokenizes; usual rows take a thousandth of it
_CHARACTERS_A_SECOND = 100_000  # that the slowest tokenizers read on any machine
_BYTES_A_TOKEN = 128  # that a token takes in Python and in JSON
_BYTES_A_BYTE = 1024  # address space that a library needs for a byte of one text: as many as twice the tokens of it
_ROWS_A_CALL, _CHARACTERS_A_CALL = 1000, 1_000_000  # of the tokenizer
_NOT_OURS = (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, DataError)


@dataclass(frozen=True, slots=True)
class Encoding:
    """How texts are encoded for a model.

    Args:
        task: of the model.
        tokenizer: the model's tokenizer.
        inputs: names of the inputs that the model takes. vocabulary: size of its vocabulary.
        label_ids: class id by label, from the model's config. labels: number of its outputs, 0 if it has no classes.
        max_length: longer examples are cut to this many tokens. positions: longest text that the model takes.
        pad: the id that pads batches.
        end: the id of which a classifier with a decoder needs exactly one in each text; None for others.
        decoder_inputs: what the decoder of a seq2seq model is fed with for these targets.
        seed: decides which tokens a masked language model has to guess.
    """

    task: Task
    tokenizer: Any
    inputs: frozenset[str]
    vocabulary: int
    label_ids: Mapping[str, int]
    labels: int
    max_length: int
    positions: int
    pad: int = 0
    end: int | None = None
    decoder_inputs: Callable[[Ids], Ids] | None = None
    seed: int = 0

    def guarded(self, work: Callable[[], Any], *, what: str, rows: int, table: Table | None = None) -> Any:
        """Call what uses the tokenizer in a child process, with limits that grow with the data; returns its result.

        Args:
            work, what: as for `in_child`. rows: how many texts it reads or writes. table: that it reads.

        Raises:
            InputError: it took too much time or memory. FedqsnError: whatever `work` raised.
        """
        characters, longest = (table.characters, table.longest_row) if table is not None else (0, 0)
        return in_child(
            work,
            what=what,
            where=self.tokenizer.name_or_path,
            seconds=SECONDS + rows * SECONDS_A_ROW + characters / _CHARACTERS_A_SECOND,
            memory=MEMORY + rows * self.max_length * _BYTES_A_TOKEN + longest * _BYTES_A_BYTE,
        )

    def features(self, table: Table, progress: Progress, *columns: str) -> tuple[list[dict[str, Ids]], set[int]]:
        """Inputs of all rows, cut to `max_length` tokens; and which rows were cut."""
        tokens, cut = self.tokens(table, progress, [table.texts(column) for column in columns], columns)
        return [self.selected(one) for one in tokens], cut

    def tokens(
        self, table: Table, progress: Progress, texts: Sequence[list[str]], columns: Sequence[str], **options: Any
    ) -> tuple[list[dict[str, Any]], set[int]]:
        """What the tokenizer gives for all rows, cut to `max_length` tokens; and which rows were cut.

        Args:
            texts: one list a column; two are pairs. columns: their names, for error messages.
            options: for the tokenizer.
        """
        found: list[dict[str, Any]] = []
        cut: set[int] = set()
        for rows in chunks(table.rows, progress, texts):
            part = self.batch(table, rows, [column[rows] for column in texts], columns, **options)
            for place, tokens in enumerate(part):
                if len(tokens["input_ids"]) > self.max_length:
                    row = slice(rows.start + place, rows.start + place + 1)
                    shorter = {**options, "truncation": True, "max_length": self.max_length}
                    (part[place],) = self.batch(table, row, [column[row] for column in texts], columns, **shorter)
                    cut.add(row.start)
            found += part
        return found, cut

    def batch(
        self, table: Table, rows: slice, texts: Sequence[list[str]], columns: Sequence[str], **options: Any
    ) -> list[dict[str, Any]]:
        """What the tokenizer gives for successive rows.

        Raises:
            DataError: it cannot tokenize one of them.
        """
        try:
            encoded = self._call(*texts, **options)
        except _NOT_OURS:
            raise
        except BaseException:  # tokenizers written in Rust may panic, which is no Exception
            self._name_row(table, rows, texts, columns, options)
            raise
        return [{name: values[place] for name, values in encoded.items()} for place in range(len(texts[0]))]

    def _call(self, *texts: Any, target: bool = False, **options: Any) -> dict[str, Any]:
        """Let the tokenizer encode texts; it may put other special tokens around those that are to be written."""
        given = {"text_target": texts[0]} if target else dict(zip(("text", "text_pair"), texts, strict=False))
        return dict(self.tokenizer(**given, verbose=False, **options))

    def _name_row(
        self,
        table: Table,
        rows: slice,
        texts: Sequence[list[str]],
        columns: Sequence[str],
        options: Mapping[str, Any],
    ) -> None:
        """Raise DataError for the first row that cannot be tokenized."""
        for row, parts in zip(range(rows.start, rows.stop), zip(*texts, strict=True), strict=True):
            with row_errors(table, row, f"{_listed(columns)} cannot be tokenized"):
                self._call(*([part] for part in parts), **options)

    def selected(self, features: Mapping[str, Any]) -> dict[str, Ids]:
        """The features that the model takes; always a mask of what is not padding, if it takes one."""
        whole = {"attention_mask": [1] * len(features["input_ids"]), **features}
        return {name: value for name, value in whole.items() if name in self.inputs}

    def boundaries(self, text: str, tokens: Mapping[str, Any], **options: Any) -> Callable[[int], int]:
        """A function from a place in a text, a number of characters, to the first token that holds something behind it.

        Args:
            tokens: of the text, with `offset_mapping` and `special_tokens_mask` if the tokenizer knows them.
            options: under which the tokenizer gave these tokens.
        """
        ids = tokens["input_ids"]
        if "offset_mapping" not in tokens:
            return lambda place: _common(ids, self._call(text[:place], **options)["input_ids"])
        stops = [
            stop if not special else -1
            for (_, stop), special in zip(tokens["offset_mapping"], tokens["special_tokens_mask"], strict=True)
        ]
        furthest, content = list(accumulate(stops, max)), _content(stops)
        return lambda place: min(bisect_right(furthest, place), content)

    @property
    def with_offsets(self) -> dict[str, bool]:
        """Options under which a tokenizer tells which characters a token holds, if it can."""
        return {"return_offsets_mapping": True, "return_special_tokens_mask": True} if self.tokenizer.is_fast else {}


@contextmanager
def row_errors(table: Table, row: int, what: str) -> Iterator[None]:
    """Turn any error within this block into a DataError that names a row."""
    try:
        yield
    except _NOT_OURS:
        raise
    except BaseException as error:  # tokenizers written in Rust may panic, which is no Exception
        raise table.error(f"{what} ({first_line(error)})", row=row) from None


def _content(stops: Sequence[int]) -> int:
    """Number of tokens up to the last one that is not special."""
    return max((i + 1 for i, stop in enumerate(stops) if stop >= 0), default=0)


def _common(first: Ids, second: Ids) -> int:
    """How many ids two lists have in common at their start."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def _listed(columns: Sequence[str]) -> str:
    return "column " + " with ".join(repr(column) for column in columns)


def chunks(
    rows: int,
    progress: Progress,
    texts: Sequence[Sequence[str]] = (),
    *,
    most_rows: int = _ROWS_A_CALL,
    most_characters: int = _CHARACTERS_A_CALL,
) -> Iterator[slice]:
    """Slices of the rows; each is reported to `progress` when the next is asked for.

    Args:
        texts: columns of text of which a slice holds about `most_characters`: what a library keeps of each token of a
            text, before it is cut, takes a hundred times the text.
    """
    first = 0
    while first < rows:
        last, characters = first, 0
        while last < min(first + most_rows, rows) and characters <= most_characters:
            characters += sum(len(column[last]) for column in texts)
            last += 1
        yield slice(first, last)
        progress.advance(last - first)
        first = last
