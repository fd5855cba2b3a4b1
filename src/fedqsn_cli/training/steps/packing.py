"""Several texts in one row of a batch, so that little is padded: `--packing`.

    input_ids      a0 a1 a2 b0 b1 c0       position_ids   0 1 2 0 1 0      (padding: 0 0 ...)
    targets        -  a1 a2 -  b1 -        no attention_mask

Positions that begin again tell transformers where a text begins, and no token attends to another text. Whether a model
heeds them is measured, not assumed.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fedqsn_cli.errors import InputError
from fedqsn_cli.training.data.examples import IGNORED, Examples, Ids
from fedqsn_cli.training.data.stored_examples import Computed, Measured

TOLERANCE = 1e-3
"""Largest difference of logits between a text alone and one behind another, relative to the largest logit."""


def packed(examples: Examples, length: int) -> Examples:
    """Put texts together into rows of at most `length` tokens: the longest first, each where it fits best.

    Args:
        examples: for a causal language model.
        length: at least that of the longest text.

    Returns:
        Rows whose `texts` says how many texts are in each.
    """
    lengths = examples.lengths
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # tokens that fit into a row, and the row; in ascending order
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        place = bisect.bisect_left(free, (lengths[text], 0))
        if place == len(free):
            rows.append([])
            space, row = length, len(rows) - 1
        else:
            space, row = free.pop(place)
        rows[row].append(text)
        bisect.insort(free, (space - lengths[text], row))

    def features(row: int) -> dict[str, Ids]:
        return _features([examples.features[text]["input_ids"] for text in rows[row]])

    def targets(row: int) -> Ids:
        return _targets([examples.targets[text] for text in rows[row]])

    return replace(
        examples,
        features=Measured([sum(lengths[text] for text in row) for row in rows], features),
        targets=Computed(len(rows), targets),
        texts=[len(row) for row in rows],
    )


def _features(texts: Sequence[list[int]]) -> dict[str, list[int]]:
    ids = [token for text in texts for token in text]
    return {"input_ids": ids, "position_ids": [place for text in texts for place in range(len(text))]}


def _targets(texts: Sequence[list[int]]) -> list[int]:
    """The targets of all texts; the first token of a text is predicted from nothing."""
    return [target for text in texts for target in (IGNORED, *text[1:])]


@torch.no_grad()
def check_separation(model: Any) -> None:
    """Compare the logits of two short texts in one row with those of each alone.

    Raises:
        InputError: they differ, so a token sees what is before its text.
    """
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    first, second = ([(start + 7 * step) % vocabulary for step in range(6)] for start in (3, 5))
    model.eval()
    together = _logits(model, _features([first, second]))
    alone = torch.cat([_logits(model, _features([text])) for text in (first, second)])
    if not bool(((together - alone).abs() <= TOLERANCE * alone.abs().max()).all()):
        what = f"texts in one row would see each other with {type(model).__name__}"
        raise InputError(what, where="--packing", hint="train without --packing")


def _logits(model: Any, features: dict[str, list[int]]) -> torch.Tensor:
    inputs = {name: torch.tensor([values], device=model.device) for name, values in features.items()}
    try:
        logits: torch.Tensor = model(**inputs, use_cache=False).logits[0].float()
    except TypeError:
        hint = "train without --packing"
        raise InputError(f"{type(model).__name__} takes no positions", where="--packing", hint=hint) from None
    return logits
