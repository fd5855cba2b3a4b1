"""Conversations through a chat template: what the assistant says counts.

A template that marks these turns ({% generation %}) is believed. For any other, turn k of the assistant is what the
template adds to the prompt that inference would give the model at this point:

    prompt(k)   messages[:k], with the generation prompt
    after(k)    messages[:k + 1]                            begins with prompt(k), and the conversation with after(k)

White space that the template puts behind the special token that ends a turn does not count: inference stops before it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fedqsn_cli.progress import Progress
from fedqsn_cli.training.examples import IGNORED, Ids
from fedqsn_cli.training.tables import Table
from fedqsn_cli.training.tokenizing import Encoding, chunks, row_errors

_MARKED_TURNS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_REFUSED = "column 'messages': the chat template does not accept the conversation"

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
    encode = _marked if marked else _rendered
    encoded, cut = list[tuple[dict[str, Any], Ids]](), set[int]()
    lists = table.lists("messages")
    for rows in chunks(table.rows, progress):
        for row in range(rows.start, rows.stop):
            ids, counts = encode(encoding, table, row, _conversation(table, row, lists[row]))
            if len(ids) > encoding.max_length:
                cut.add(row)
            encoded.append(_shortened(encoding, ids, counts))
    return encoded, cut


def _shortened(encoding: Encoding, ids: Ids, counts: Sequence[bool]) -> tuple[dict[str, Any], Ids]:
    targets = [token if counted else IGNORED for token, counted in zip(ids, counts, strict=True)]
    left = encoding.tokenizer.truncation_side == "left"
    kept = slice(-encoding.max_length, None) if left else slice(encoding.max_length)
    return {"input_ids": ids[kept]}, targets[kept]


def _conversation(table: Table, row: int, messages: list[Any]) -> Messages:
    """The turns without null fields: columnar files have them where only other turns have a value."""
    if not messages or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and "content" in turn for turn in messages
    ):
        raise table.error("column 'messages' is not a list of objects with a role and a content", row=row)
    for turn in messages:
        if isinstance(turn["content"], str):
            table.check_characters("messages", row, turn["content"])
    return [{key: value for key, value in turn.items() if value is not None or key == "content"} for turn in messages]


def _marked(encoding: Encoding, table: Table, row: int, messages: Messages) -> tuple[Ids, Sequence[bool]]:
    """What counts as the template marks it."""
    with row_errors(table, row, _REFUSED):
        tokens = encoding.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    return list(tokens["input_ids"]), [bool(counted) for counted in tokens["assistant_masks"]]


def _rendered(encoding: Encoding, table: Table, row: int, messages: Messages) -> tuple[Ids, Sequence[bool]]:
    """What counts by rendering the conversation up to each turn of the assistant."""
    with row_errors(table, row, _REFUSED):
        text = _render(encoding, messages, prompt=False)
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        spans = [_span(encoding, table, row, messages, turn, text) for turn in turns]
    with row_errors(table, row, "column 'messages' cannot be tokenized"):
        tokens = encoding.tokenizer(text, add_special_tokens=False, verbose=False, **encoding.with_offsets)
    ids = list(tokens["input_ids"])
    counts = [False] * len(ids)
    for span in spans:
        start, stop = encoding.boundaries(text, tokens, span, add_special_tokens=False)
        counts[start:stop] = [True] * (stop - start)
    return ids, counts


def _span(encoding: Encoding, table: Table, row: int, messages: Messages, turn: int, text: str) -> tuple[int, int]:
    """The characters of one turn of the assistant. Raises DataError where rendered prefixes do not tell."""
    prompt = _render(encoding, messages[:turn], prompt=True) if turn else _first_prompt(encoding, messages)
    after = _render(encoding, messages[: turn + 1], prompt=False)
    if prompt is None:
        what = "the assistant begins, and the chat template has no generation prompt"
    elif not after.startswith(prompt):
        what = f"the chat template renders turn {turn + 1} otherwise than behind its own generation prompt"
    elif not text.startswith(after):
        what = f"the chat template renders turn {turn + 1} otherwise once other turns follow"
    else:
        return len(prompt), len(prompt) + len(_without_end(encoding, after[len(prompt) :]))
    hint = "mark the assistant's turns in the template with {% generation %}, or give prompt and completion"
    raise table.error(f"column 'messages': {what}, so what to learn is not known", row=row, hint=hint)


def _first_prompt(encoding: Encoding, messages: Messages) -> str | None:
    """The prompt of an assistant that begins: up to the generation prompt, as it stands behind the first turn.

    `transformers` renders no conversation without a turn. None where the template has no generation prompt.
    """
    turn = _render(encoding, messages[:1], prompt=False)
    added = _render(encoding, messages[:1], prompt=True).removeprefix(turn)
    return turn[: turn.index(added) + len(added)] if added and added in turn else None


def _without_end(encoding: Encoding, turn: str) -> str:
    """A turn without the white space behind the special token that ends it."""
    stripped = turn.rstrip()
    return stripped if stripped.endswith(tuple(_special_tokens(encoding))) else turn


def _special_tokens(encoding: Encoding) -> set[str]:
    added = getattr(encoding.tokenizer, "added_tokens_decoder", {}).values()
    return {str(token) for token in added if token.special} | set(encoding.tokenizer.all_special_tokens)


def _render(encoding: Encoding, messages: Messages, *, prompt: bool) -> str:
    return str(encoding.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
