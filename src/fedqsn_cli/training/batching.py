"""Encoded examples, and batches of them: examples of similar length, padded on the right."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from fedqsn_cli.models.torch_model import Task

IGNORED = -100  # a target that the loss does not count
_POOL = 50  # batches whose examples are sorted by length together: little padding, and still shuffled


@dataclass(frozen=True, slots=True)
class Examples:
    """Examples as a model takes them.

    Args:
        task: decides what targets are.
        features: for each example, integers [tokens] by input name.
        targets: for each example a class id (classification), or ids [tokens] of which the loss counts those that are
            not IGNORED (causal-lm; the model predicts the id at position t from position t - 1).
        skipped: number of rows without a target that counts, which are not among the examples.
        texts: how many texts each example was packed from; None where each is one.
    """

    task: Task
    features: Sequence[dict[str, list[int]]]
    targets: Sequence[int] | Sequence[list[int]]
    skipped: int = 0
    texts: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.features)

    def texts_in(self, rows: Iterable[int]) -> int:
        """How many texts are in some examples."""
        return sum(1 if self.texts is None else self.texts[row] for row in rows)

    def to_plain(self) -> dict[str, Any]:
        """As JSON can hold it: each field by its name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_plain(cls, document: dict[str, Any]) -> Self:
        """What `to_plain` gave."""
        return cls(**document)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(feature["input_ids"]) for feature in self.features]


@dataclass(frozen=True, slots=True)
class Padding:
    """Ids appended to the shorter examples of a batch."""

    token: int
    token_type: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Some examples, stacked.

    Args:
        inputs: int64 [batch, tokens] by input name.
        targets: int64, class ids [batch] or token ids [batch, tokens].
        count: how many targets the loss counts.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    count: int

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch({name: x.to(device) for name, x in self.inputs.items()}, self.targets.to(device), self.count)


def collate(examples: Examples, rows: Sequence[int], padding: Padding) -> Batch:
    """Stack the examples of some rows, padded on the right to the longest of them."""
    features = [examples.features[row] for row in rows]
    length = max(len(feature["input_ids"]) for feature in features)
    fills = {"input_ids": padding.token, "token_type_ids": padding.token_type}
    inputs = {name: _pad([feature[name] for feature in features], length, fills.get(name, 0)) for name in features[0]}
    if examples.task == "classification":
        targets = torch.tensor([examples.targets[row] for row in rows], dtype=torch.int64)
        return Batch(inputs, targets, len(rows))
    texts: list[Any] = [examples.targets[row] for row in rows]
    targets = _pad(texts, length, IGNORED)
    return Batch(inputs, targets, int((targets != IGNORED).sum()))


def _pad(rows: Sequence[list[int]], length: int, fill: int) -> Tensor:
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows], dtype=torch.int64)


def loss_sum(task: Task, logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the negative log-likelihoods (nats) of all targets that count, in fp32.

    Args:
        logits: [batch, classes], or [batch, tokens, vocabulary].
        targets: [batch], or [batch, tokens] with IGNORED where nothing counts.
    """
    if task == "classification":
        return functional.cross_entropy(logits.float(), targets, reduction="sum")
    following = targets[:, 1:]  # position t - 1 predicts the token at t
    counts = following != IGNORED
    return functional.cross_entropy(logits[:, :-1][counts].float(), following[counts], reduction="sum")


def in_order(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Batches of row numbers for evaluation: every row once, the longest first."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for first in range(0, len(order), size):
        yield order[first : first + size]


def shuffled(lengths: Sequence[int], size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Batches of row numbers for one epoch of training: random, with similar lengths together.

    Equal arguments give equal batches.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    pool = size * _POOL
    batches: list[list[int]] = []
    for first in range(0, len(order), pool):
        similar = sorted(order[first : first + pool], key=lambda row: -lengths[row])
        batches += [similar[start : start + size] for start in range(0, len(similar), size)]
    return [batches[number] for number in torch.randperm(len(batches), generator=generator).tolist()]
