"""Rows for language models: plain texts, prompts with completions, sources with targets, masked texts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from fedqsn_cli.errors import InputError
from fedqsn_cli.progress import Progress
from fedqsn_cli.training.data import chat
from fedqsn_cli.training.data.examples import IGNORED, Examples, Ids
from fedqsn_cli.training.data.tables import Table
from fedqsn_cli.training.data.tokenizing import Encoding, chunks

_HIDDEN = 0.15  # share of the tokens that a masked language model has to guess (BERT, arXiv 1810.04805)

EncodedText = tuple[dict[str, Any], Ids]
"""Tokens and targets."""


def language(encoding: Encoding, table: Table, progress: Progress) -> Examples:
    """Conversations, prompts with completions, or plain texts: whichever of these columns there are first."""
    if any(name in table.columns for name in chat.COLUMNS):
        encoded, cut = chat.conversations(encoding, table, progress)
    elif "prompt" in table.columns or "completion" in table.columns:
        table.require("prompt", "completion", why="a prompt needs a completion")
        encoded, cut = completions(encoding, table, progress)
    else:
        table.require("text", why="language models need text, prompt and completion, or messages")
        tokens, cut = encoding.tokens(table, progress, [table.texts("text")], ["text"])
        encoded = [(one, one["input_ids"]) for one in tokens]
    return _counting(encoding, [(one, [IGNORED, *targets[1:]]) for one, targets in encoded], cut)


def _counting(encoding: Encoding, encoded: Sequence[EncodedText], cut: set[int]) -> Examples:
    """Examples of the texts in which something counts."""
    kept = [(tokens, targets) for tokens, targets in encoded if any(target != IGNORED for target in targets)]
    features = [encoding.selected(tokens) for tokens, _ in kept]
    return Examples(encoding.task, features, [targets for _, targets in kept], len(encoded) - len(kept), cut=len(cut))


def completions(encoding: Encoding, table: Table, progress: Progress) -> tuple[list[EncodedText], set[int]]:
    """The tokens of prompt and completion as one text, as inference makes them; the completion and an end count."""
    prompts, replies = table.texts("prompt"), table.texts("completion")
    encoded: list[EncodedText] = []
    cut: set[int] = set()
    for rows in chunks(table.rows, progress, (prompts, replies)):
        parts = list(zip(prompts[rows], replies[rows], strict=True))
        texts = ["".join(part) for part in parts]
        tokens = encoding.batch(table, rows, [texts], ["prompt", "completion"], **encoding.with_offsets)
        for (prompt, _), text, one in zip(parts, texts, tokens, strict=True):
            start = encoding.boundaries(text, one)(len(prompt))
            ids = _ended(encoding, list(one["input_ids"]))
            shorter = _shortened(encoding, ids[:start], ids[start:], encoding.max_length)
            if len(shorter[0]) + len(shorter[1]) < len(ids):
                cut.add(len(encoded))
            encoded.append(_prompted(*shorter))
    return encoded, cut


def _ended(encoding: Encoding, ids: Ids) -> Ids:
    """With one end-of-text token behind it, if the tokenizer has any."""
    end = encoding.tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _shortened(encoding: Encoding, prompt: Ids, reply: Ids, length: int) -> tuple[Ids, Ids]:
    """A prompt and a reply of at most `length` tokens. The start of the prompt is cut first, then the reply's end.

    A special token at the start of the prompt is kept.
    """
    reply = reply[: length - 1] if prompt else reply[:length]
    room = length - len(reply)
    if len(prompt) > room:
        head = 1 if prompt[0] in encoding.tokenizer.all_special_ids and room > 1 else 0
        prompt = prompt[:head] + prompt[len(prompt) - (room - head) :]
    return prompt, reply


def _prompted(prompt: Ids, reply: Ids) -> EncodedText:
    return {"input_ids": prompt + reply}, [IGNORED] * len(prompt) + reply


def prompt_ids(encoding: Encoding, table: Table, row: int, text: str, column: str, new: int) -> Ids:
    """What inference gives the model to go on from, so that `new` tokens fit behind it.

    Raises:
        DataError: there is no token to go on from.
    """
    place, decoder = slice(row, row + 1), encoding.task == "seq2seq"
    options = {"truncation": True, "max_length": encoding.max_length} if decoder else {}
    ids = list(encoding.batch(table, place, [[text]], [column], **options)[0]["input_ids"])
    if not decoder and ids[-1:] == [encoding.tokenizer.eos_token_id]:
        ids.pop()
    if not ids:
        raise table.error(f"column {column!r} holds no token to go on from", row=row)
    return ids if decoder else _shortened(encoding, ids, [], min(encoding.max_length, encoding.positions - new))[0]


def sources(encoding: Encoding, table: Table, progress: Progress) -> Examples:
    """`source` is read, `target` is what the decoder learns to write, with the special tokens around it."""
    table.require("source", "target", why="a sequence-to-sequence model needs source and target")
    decoder_inputs = encoding.decoder_inputs
    if decoder_inputs is None:
        raise InputError("the model has no decoder", hint="only encoder-decoder models take source and target")
    features, cut = encoding.features(table, progress, "source")
    targets: list[Ids] = []
    texts = table.texts("target")
    for rows in chunks(table.rows, progress, (texts,)):
        targets += [one["input_ids"] for one in encoding.batch(table, rows, [texts[rows]], ["target"], target=True)]
    cut |= {row for row, target in enumerate(targets) if len(target) > encoding.max_length}
    shorter = [target[: encoding.max_length] for target in targets]  # without an end: the model shall not learn to stop
    kept = [row for row, target in enumerate(shorter) if target and features[row]["input_ids"]]
    fed = [encoding.selected({**features[row], "decoder_input_ids": decoder_inputs(shorter[row])}) for row in kept]
    kept_targets = [shorter[row] for row in kept]
    return Examples(encoding.task, fed, kept_targets, table.rows - len(kept), cut=len(cut))


def masked(encoding: Encoding, table: Table, progress: Progress) -> Examples:
    """Some tokens of `text` count: of each ten, eight are masked, one is another token, and one is left (BERT)."""
    table.require("text", why="a masked language model needs text")
    if encoding.tokenizer.mask_token_id is None:
        raise InputError("the tokenizer has no mask token", hint="add it to its files")
    texts = table.texts("text")
    tokens, cut = encoding.tokens(table, progress, [texts], ["text"], return_special_tokens_mask=True)
    return _counting(encoding, [_with_masks(encoding, row, one) for row, one in enumerate(tokens, table.first)], cut)


def _with_masks(encoding: Encoding, row: int, tokens: dict[str, Any]) -> EncodedText:
    """Tokens of which some are masked, the same for the same seed and row."""
    ids = list(tokens["input_ids"])
    targets = [IGNORED] * len(ids)
    choice = random.Random(f"{encoding.seed} {row}")
    places = [place for place, special in enumerate(tokens["special_tokens_mask"]) if not special]
    for place in choice.sample(places, max(1, round(_HIDDEN * len(places))) if places else 0):
        targets[place] = ids[place]
        draw = choice.random()
        if draw < 0.8:
            ids[place] = encoding.tokenizer.mask_token_id
        elif draw < 0.9:
            ids[place] = choice.randrange(min(encoding.vocabulary, len(encoding.tokenizer)))
    return {**tokens, "input_ids": ids}, targets
