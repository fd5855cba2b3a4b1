"""Encoded examples: what the model takes, and what the loss counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from fedqsn_cli.models.architecture import Task
from fedqsn_cli.training.data.stored_examples import Measured

IGNORED = -100  # a target that the loss does not count
Ids = list[int]


@dataclass(frozen=True, slots=True)
class Examples:
    """Examples as a model takes them.

    Args:
        task: decides what targets are (`tasks`).
        features: for each example, integers [tokens] by input name.
        targets: for each example a class id (classification), numbers [outputs] (regression and multi-label), or ids
            [tokens] of which the loss counts those that are not IGNORED. A causal language model predicts the id at
            position t from position t - 1; all others at t.
        skipped: number of rows without a target that counts, which are not among the examples.
        texts: how many texts each example was packed from; None where each is one.
        cut: number of rows that were too long and lost a part.
        unused: columns of the file that nothing was made of.
    """

    task: Task
    features: Sequence[dict[str, Ids]]
    targets: Sequence[Any]
    skipped: int = 0
    texts: Sequence[int] | None = None
    cut: int = 0
    unused: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.features)

    def some(self, rows: Iterable[int]) -> Self:
        """The examples of some rows, which are not packed."""
        kept = list(rows)
        return replace(self, features=[self.features[row] for row in kept], targets=[self.targets[row] for row in kept])

    def texts_in(self, rows: Iterable[int]) -> int:
        """How many texts are in some examples."""
        return sum(1 if self.texts is None else self.texts[row] for row in rows)

    def to_plain(self) -> dict[str, Any]:
        """As JSON can hold it: each field by its name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_plain(cls, document: dict[str, Any]) -> Self:
        """What `to_plain` gave, once JSON held it."""
        return cls(**{**document, "unused": tuple(document["unused"])})

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each example, those that a decoder is fed with included."""
        if isinstance(self.features, Measured):
            return self.features.lengths
        return [len(feature["input_ids"]) + len(feature.get("decoder_input_ids", ())) for feature in self.features]

    def and_counts_of(self, other: Self) -> Self:
        """These examples, with what was skipped, cut and not used of other rows of the same file, too."""
        return replace(self, skipped=self.skipped + other.skipped, cut=self.cut + other.cut, unused=other.unused)


@dataclass(frozen=True, slots=True)
class Padding:
    """Ids appended to the shorter examples of a batch."""

    token: int
    token_type: int = 0
