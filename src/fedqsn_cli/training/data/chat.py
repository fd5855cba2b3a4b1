"""Conversations through a chat template: what the assistant says counts.

A template that marks these turns ({% generation %}) is believed. For any other, turn k of the assistant is what the
template adds to the prompt that inference would give the model at this point:

    prompt(k)   messages[:k], with the generation prompt
    after(k)    messages[:k + 1]                            begins with prompt(k), and the conversation with after(k)

White space that the template puts behind the special token that ends a turn does not count: inference stops before it.

Files hold turns as {"role", "content"} or as {"from", "value"} (ShareGPT). A content that is a list of texts is given
to the template as such if it does with lists, else as one text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedqsn_cli.errors import DataError
from fedqsn_cli.progress import Progress
from fedqsn_cli.training.data.examples import IGNORED, Ids
from fedqsn_cli.training.data.tables import Table, type_name
from fedqsn_cli.training.data.tokenizing import Encoding, chunks, row_errors

COLUMNS = ("messages", "conversations")
"""Columns that hold conversations; the first that a file has is used."""

_MARKED_TURNS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
_NO_TURNS = "is not a list of objects with a role and a content"
_PROBE = "fedqsn"  # a text that no template writes by itself

Messages = list[dict[str, Any]]


def conversations(
    encoding: Encoding, table: Table, progress: Progress
) -> tuple[list[tuple[dict[str, Any], Ids]], set[int]]:
    """Tokens and targets of all conversations; and which rows were cut.

    Raises:
        DataError: there is no chat template, or it does not do with a row.
    """
    template = encoding.tokenizer.chat_template
    if not template:
        raise table.error("the model's tokenizer has no chat template", hint="give prompt and completion, or text")
    marked = isinstance(template, str) and _MARKED_TURNS.search(template) is not None
    column = next(name for name in COLUMNS if name in table.columns)
    lists = table.lists(column)
    given = table.values("tools") if "tools" in table.columns else [None] * table.rows
    encoded, cut = list[tuple[dict[str, Any], Ids]](), set[int]()
    for rows in chunks(table.rows, progress):
        for row in range(rows.start, rows.stop):
            one = _Conversation(encoding, table, row, column, lists[row], _tools(table, row, given[row])).normalized()
            ids, counts = one.marked() if marked else one.rendered()
            if len(ids) > encoding.max_length:
                cut.add(row)
            encoded.append(_shortened(encoding, ids, counts))
    return encoded, cut


def _tools(table: Table, row: int, value: Any) -> list[Any] | None:
    """Descriptions of the tools that a conversation may call; None without any."""
    return None if value is None else table.listed("tools", row, value) or None


def _shortened(encoding: Encoding, ids: Ids, counts: Sequence[bool]) -> tuple[dict[str, Any], Ids]:
    targets = [token if counted else IGNORED for token, counted in zip(ids, counts, strict=True)]
    kept = _kept(encoding, len(ids))
    part = slice(kept.start, kept.stop)
    return {"input_ids": ids[part]}, targets[part]


def _kept(encoding: Encoding, tokens: int) -> range:
    """Which of so many tokens are not cut."""
    left = encoding.tokenizer.truncation_side == "left"
    return range(max(0, tokens - encoding.max_length), tokens) if left else range(min(tokens, encoding.max_length))


@dataclass(frozen=True, slots=True)
class _Conversation:
    """The turns of a row, and what the template may be told beside them."""

    encoding: Encoding
    table: Table
    row: int
    column: str
    messages: Messages
    tools: list[Any] | None

    def normalized(self) -> _Conversation:
        """With turns as templates take them. Raises DataError."""
        if not self.messages:
            raise self._wrong(_NO_TURNS)
        return replace(self, messages=[self._turn(number, turn) for number, turn in enumerate(self.messages, 1)])

    def _turn(self, number: int, turn: Any) -> dict[str, Any]:
        """A turn without null fields: columnar files have them where only other turns have a value."""
        given = {key: value for key, value in turn.items() if value is not None} if isinstance(turn, dict) else {}
        if "from" in given and "role" not in given:
            role = given.pop("from")
            given["role"] = _ROLES.get(str(role), role)
            given |= {"content": given.pop("value")} if "value" in given else {}
        says_something = "content" in given or "content" in turn or "tool_calls" in given
        if not isinstance(given.get("role"), str) or not says_something:
            raise self._wrong(_NO_TURNS)
        content = given.get("content")
        if isinstance(content, str):
            self.table.check_characters(self.column, self.row, content)
        return {**given, "content": self._text(number, content) if isinstance(content, list) else content}

    def _text(self, number: int, parts: list[Any]) -> Any:
        """A content of several texts, as the template takes it. Raises DataError: a part is not text."""
        texts: list[str] = []
        for part in parts:
            text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
            if type(text) is not str:
                raise self._wrong(f"has a part in turn {number} that is not text ({type_name(text)})")
            self.table.check_characters(self.column, self.row, text)
            texts.append(text)
        return [{"type": "text", "text": text} for text in texts] if self._takes_lists() else "".join(texts)

    def _takes_lists(self) -> bool:
        """Does the template write the texts of a list, and nothing else of it?"""
        probe: Messages = [{"role": "user", "content": [{"type": "text", "text": _PROBE}]}]
        try:
            written = str(self.encoding.tokenizer.apply_chat_template(probe, tokenize=False))
        except Exception:  # whatever a template raises
            return False
        return _PROBE in written and f"'{_PROBE}'" not in written

    def marked(self) -> tuple[Ids, Sequence[bool]]:
        """Tokens, and what counts as the template marks it."""
        with row_errors(self.table, self.row, self._refused):
            tokens = self.encoding.tokenizer.apply_chat_template(
                self.messages, tools=self.tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        return list(tokens["input_ids"]), [bool(counted) for counted in tokens["assistant_masks"]]

    def rendered(self) -> tuple[Ids, Sequence[bool]]:
        """Tokens, and what counts by rendering the conversation up to each turn of the assistant."""
        with row_errors(self.table, self.row, self._refused):
            text = self._render(self.messages, prompt=False)
        with row_errors(self.table, self.row, f"column {self.column!r} cannot be tokenized"):
            tokens = self.encoding.tokenizer(
                text, add_special_tokens=False, verbose=False, **self.encoding.with_offsets
            )
        ids = list(tokens["input_ids"])
        counts = [False] * len(ids)
        boundary = self.encoding.boundaries(text, tokens, add_special_tokens=False)
        kept = _kept(self.encoding, len(ids))
        begin_is_cut = kept.start > 0
        turns = [turn for turn, message in enumerate(self.messages) if message["role"] == "assistant"]
        for turn in reversed(turns) if begin_is_cut else turns:
            with row_errors(self.table, self.row, self._refused):
                span = self._span(turn, text)
            start, stop = map(boundary, span)
            if stop <= kept.start if begin_is_cut else start >= kept.stop:
                break  # all others are cut, too, and each of them costs two renderings
            counts[start:stop] = [True] * (stop - start)
        return ids, counts

    def _span(self, turn: int, text: str) -> tuple[int, int]:
        """The characters of one turn of the assistant. Raises DataError where rendered prefixes do not tell."""
        prompt = self._render(self.messages[:turn], prompt=True) if turn else self._first_prompt()
        after = self._render(self.messages[: turn + 1], prompt=False)
        if prompt is None:
            what = "the assistant begins, and the chat template has no generation prompt"
        elif not after.startswith(prompt):
            what = f"the chat template renders turn {turn + 1} otherwise than behind its own generation prompt"
        elif not text.startswith(after):
            what = f"the chat template renders turn {turn + 1} otherwise once other turns follow"
        else:
            return len(prompt), len(prompt) + len(_without_end(self.encoding, after[len(prompt) :]))
        hint = "mark the assistant's turns in the template with {% generation %}, or give prompt and completion"
        what = f"column {self.column!r}: {what}, so what to learn is not known"
        raise self.table.error(what, row=self.row, hint=hint)

    def _first_prompt(self) -> str | None:
        """The prompt of an assistant that begins: up to the generation prompt, as it comes after the first turn.

        `transformers` renders no conversation without a turn. None where the template has no generation prompt.
        """
        turn = self._render(self.messages[:1], prompt=False)
        added = self._render(self.messages[:1], prompt=True).removeprefix(turn)
        return turn[: turn.index(added) + len(added)] if added and added in turn else None

    def _render(self, messages: Messages, *, prompt: bool) -> str:
        template = self.encoding.tokenizer.apply_chat_template
        return str(template(messages, tools=self.tools, tokenize=False, add_generation_prompt=prompt))

    @property
    def _refused(self) -> str:
        return f"column {self.column!r}: the chat template does not accept the conversation"

    def _wrong(self, what: str) -> DataError:
        return self.table.error(f"column {self.column!r} {what}", row=self.row)


def _without_end(encoding: Encoding, turn: str) -> str:
    """A turn without the white space behind the special token that ends it."""
    stripped = turn.rstrip()
    return stripped if stripped.endswith(tuple(_special_tokens(encoding))) else turn


def _special_tokens(encoding: Encoding) -> set[str]:
    added = getattr(encoding.tokenizer, "added_tokens_decoder", {}).values()
    return {str(token) for token in added if token.special} | set(encoding.tokenizer.all_special_tokens)
