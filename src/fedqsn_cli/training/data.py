"""Rows of a data file -> token ids and targets.

    task             columns                   what the loss counts
    classification   text, label               the label
                     text, text_pair, label    the label
    causal-lm        messages                  turns of the assistant, if the chat template marks them; else all tokens
                     prompt, completion        the completion and the end-of-text token after it
                     text                      all tokens

A file with the columns of several lines is read as the first of these lines says. Other columns are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedqsn_cli.errors import InputError
from fedqsn_cli.models.child_process import in_child
from fedqsn_cli.models.torch_model import Loaded, Task, first_line
from fedqsn_cli.progress import SILENT, Progress
from fedqsn_cli.training.batching import IGNORED, Examples, Padding
from fedqsn_cli.training.tables import Table

_CHUNK = 1000  # rows per call of the tokenizer
SECONDS, SECONDS_A_ROW = 10, 0.05  # of processor time for tokenizing a file; usual rows take a thousandth of it
_MARKED_TURNS = re.compile(r"\{%-?\s*generation\s*-?%\}")

Ids = list[int]
EncodedText = tuple[dict[str, Ids], Ids]  # features and targets


@dataclass(frozen=True, slots=True)
class Encoder:
    """Encodes rows of data for one model.

    Args:
        task: classification or causal-lm.
        tokenizer: the model's tokenizer.
        inputs: names of the inputs that the model takes. vocabulary: size of its vocabulary.
        label_ids: class id by label, from the model's config. labels: number of classes.
        max_length: longer examples are cut to this many tokens.
    """

    task: Task
    tokenizer: Any
    inputs: frozenset[str]
    vocabulary: int
    label_ids: Mapping[str, int]
    labels: int
    max_length: int

    @classmethod
    def of(cls, loaded: Loaded, max_length: int) -> Encoder:
        """The encoder for a model; texts are cut to `max_length` tokens, or to what the model takes if that is less.

        Raises:
            InputError: the model is for a task that cannot be trained, or has no tokenizer.
        """
        if loaded.task not in ("classification", "causal-lm"):
            raise InputError(
                f"{type(loaded.model).__name__} is a {loaded.task} model",
                hint="only sequence classifiers and causal language models can be trained and evaluated",
            )
        if loaded.tokenizer is None:
            raise InputError("the model has no tokenizer", hint="add the tokenizer's files to its folder")
        config = loaded.model.config
        labels = int(getattr(config, "num_labels", 0)) if loaded.task == "classification" else 0
        kind = getattr(config, "problem_type", None)
        if loaded.task == "classification" and (labels < 2 or kind not in (None, "single_label_classification")):
            kind = kind or "regression"
            raise InputError(
                f"the model's problem type is {kind}", hint="only classifiers with one label per text are supported"
            )
        limit = min(max_length, loaded.positions, int(loaded.tokenizer.model_max_length))
        label_ids = {str(name): int(number) for name, number in (getattr(config, "label2id", None) or {}).items()}
        return cls(loaded.task, loaded.tokenizer, loaded.inputs, loaded.vocabulary, label_ids, labels, limit)

    @property
    def padding(self) -> Padding:
        """Ids to pad batches with."""
        token = self.tokenizer.pad_token_id
        if token is None:
            token = self.tokenizer.eos_token_id or 0  # any id will do: the attention mask excludes it
        return Padding(int(token), int(getattr(self.tokenizer, "pad_token_type_id", 0)))

    def encode(self, table: Table, progress: Progress) -> Examples:
        """Token ids and targets of all rows.

        Raises:
            DataError: a column is missing, or a row cannot be used.
        """
        progress.start(f"reading {table.path.name}", table.rows, "examples")
        encode = self._classification if self.task == "classification" else self._language_model
        examples = Examples.from_plain(
            in_child(
                lambda: encode(table, SILENT).to_plain(),
                what=f"tokenizing {table.path.name}",
                where=self.tokenizer.name_or_path,
                seconds=SECONDS + table.rows * SECONDS_A_ROW,
            )
        )
        progress.advance(table.rows)
        progress.finish()
        if not len(examples):
            raise table.error("no row has a text to learn from")
        if max(max(feature["input_ids"]) for feature in examples.features) >= self.vocabulary:
            raise InputError(f"the tokenizer has ids beyond the model's vocabulary of {self.vocabulary}")
        return examples

    def _classification(self, table: Table, progress: Progress) -> Examples:
        table.require("text", "label", why="classification needs text and label, and takes text_pair")
        targets = [self._label(table, row, value) for row, value in enumerate(table.columns["label"])]
        texts = table.texts("text")
        pairs = table.texts("text_pair") if "text_pair" in table.columns else None
        features: list[dict[str, Ids]] = []
        for rows in _chunks(table.rows, progress):
            features += self._tokens(texts[rows], pairs[rows] if pairs else None)
        for row, feature in enumerate(features):
            if not feature["input_ids"]:
                raise table.error("the text is empty", row=row)
        return Examples(self.task, features, targets)

    def _label(self, table: Table, row: int, value: object) -> int:
        """Class id of a label: by its name in the model's config, else by its number."""
        if type(value) is str and value in self.label_ids:
            number = self.label_ids[value]
        elif type(value) is int:
            number = value
        elif type(value) is str and re.fullmatch(r"\s*\d{1,9}\s*", value):
            number = int(value)
        else:
            known = ", ".join(list(self.label_ids)[:8])
            shown = repr(value)[:60] if isinstance(value, (str, float, bool)) else "this"
            hint = f"its labels are {known} or their numbers"
            raise table.error(f"{shown} is not a label of the model", row=row, hint=hint)
        if not 0 <= number < self.labels:
            hint = f"the model has labels 0 to {self.labels - 1}"
            raise table.error(f"label {number} is out of range", row=row, hint=hint)
        return number

    def _language_model(self, table: Table, progress: Progress) -> Examples:
        if "messages" in table.columns:
            encoded = self._each(table, progress, self._conversations(table))
        elif "prompt" in table.columns or "completion" in table.columns:
            table.require("prompt", "completion", why="a prompt needs a completion")
            encoded = self._completions(table, progress)
        else:
            table.require("text", why="language models need text, prompt and completion, or messages")
            encoded = self._plain(table, progress)
        return self._predictable(encoded)

    def _predictable(self, encoded: Sequence[EncodedText]) -> Examples:
        """Examples of the texts in which at least one token is predicted from the tokens before it."""
        kept = [(features, targets) for features, targets in encoded if any(x != IGNORED for x in targets[1:])]
        features = [_select(item, self.inputs) for item, _ in kept]
        return Examples(self.task, features, [[IGNORED, *targets[1:]] for _, targets in kept], len(encoded) - len(kept))

    def _plain(self, table: Table, progress: Progress) -> list[EncodedText]:
        texts = table.texts("text")
        encoded: list[EncodedText] = []
        for rows in _chunks(table.rows, progress):
            encoded += [(feature, feature["input_ids"]) for feature in self._tokens(texts[rows], None)]
        return encoded

    def _completions(self, table: Table, progress: Progress) -> list[EncodedText]:
        prompts, completions = table.texts("prompt"), table.texts("completion")
        end = self.tokenizer.eos_token_id
        encoded: list[EncodedText] = []
        for rows in _chunks(table.rows, progress):
            before = self.tokenizer(prompts[rows], add_special_tokens=True)["input_ids"]
            after = self.tokenizer(completions[rows], add_special_tokens=False)["input_ids"]
            encoded += [self._concatenated(prompt, reply, end) for prompt, reply in zip(before, after, strict=True)]
        return encoded

    def _concatenated(self, prompt: Ids, reply: Ids, end: int | None) -> EncodedText:
        """Prompt and reply as one text. If it is too long, the start of the prompt is cut first, then the reply's end.

        A special token at the start of the prompt is kept.
        """
        if end is not None:
            prompt = prompt[:-1] if prompt and prompt[-1] == end else prompt
            reply = reply if reply and reply[-1] == end else [*reply, end]
        reply = reply[: self.max_length - 1]
        room = self.max_length - len(reply)
        if len(prompt) > room:
            head = 1 if prompt[0] in self.tokenizer.all_special_ids and room > 1 else 0
            prompt = prompt[:head] + prompt[len(prompt) - (room - head) :]
        ids = prompt + reply
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}, [IGNORED] * len(prompt) + reply

    def _conversations(self, table: Table) -> Callable[[int], EncodedText]:
        """A function that encodes the conversation of a row. Raises DataError without a chat template."""
        template = self.tokenizer.chat_template
        if not template:
            raise table.error("the model's tokenizer has no chat template", hint="give prompt and completion, or text")
        marked = isinstance(template, str) and _MARKED_TURNS.search(template) is not None

        def encode(row: int) -> EncodedText:
            messages = table.columns["messages"][row]
            if not _is_conversation(messages):
                raise table.error("messages is not a list of objects with a role and a content", row=row)
            try:
                tokens = self.tokenizer.apply_chat_template(
                    _without_nulls(messages),
                    tokenize=True,
                    return_dict=True,
                    return_assistant_tokens_mask=marked,
                    truncation=True,
                    max_length=self.max_length,
                )
            except Exception as error:  # a template may raise anything about a conversation that it does not allow
                raise table.error(
                    f"the chat template does not accept the conversation ({first_line(error)})", row=row
                ) from None
            ids = list(tokens["input_ids"])
            counts = tokens["assistant_masks"] if marked else [1] * len(ids)
            targets = [token if count else IGNORED for token, count in zip(ids, counts, strict=True)]
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}, targets

        return encode

    def _each(self, table: Table, progress: Progress, encode: Callable[[int], EncodedText]) -> list[EncodedText]:
        return [encode(row) for rows in _chunks(table.rows, progress) for row in range(*rows.indices(table.rows))]

    def _tokens(self, texts: list[str], pairs: list[str] | None) -> list[dict[str, Ids]]:
        """Inputs of some texts, or pairs of texts, cut to `max_length` tokens."""
        encoded = self.tokenizer(texts, pairs, truncation=True, max_length=self.max_length)
        columns = _select(dict(encoded), self.inputs)
        return [{name: values[row] for name, values in columns.items()} for row in range(len(texts))]


def _select(features: Mapping[str, Any], inputs: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in features.items() if name in inputs}


def _is_conversation(messages: object) -> bool:
    """Is it a list of turns, each an object with a role and a content?"""
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(turn, dict) and isinstance(turn.get("role"), str) and "content" in turn for turn in messages)
    )


def _without_nulls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turns without null fields: columnar files have them where only other turns have a value."""
    return [{key: value for key, value in turn.items() if value is not None or key == "content"} for turn in messages]


def _chunks(rows: int, progress: Progress) -> Iterator[slice]:
    """Slices of the rows; each is reported to `progress` when the next is asked for."""
    for first in range(0, rows, _CHUNK):
        part = slice(first, min(first + _CHUNK, rows))
        yield part
        progress.advance(part.stop - part.start)
