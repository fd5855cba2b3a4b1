"""Encoded examples, and how they are put together to batches of nearly equal length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedqsn_cli.models.torch_model import Task

IGNORED = -100  # a target that the loss leaves out
_POOL = 50  # batches among which examples are sorted by length: little padding, still well mixed


@dataclass(frozen=True, slots=True)
class Examples:
    """Examples as a model takes them.

    Args:
        task: decides what targets are.
        features: for each example, input name -> (tokens,) integers.
        targets: for each example a class id (classification), or (tokens,) ids of which the loss counts those that are
            not IGNORED (causal-lm; the id at position t is what the model predicts at t - 1).
        skipped: rows left out because there was nothing to learn from in them.
    """

    task: Task
    features: Sequence[dict[str, list[int]]]
    targets: Sequence[int] | Sequence[list[int]]
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.features)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(feature["input_ids"]) for feature in self.features]


@dataclass(frozen=True, slots=True)
class Padding:
    """Ids that fill up shorter examples of a batch."""

    token: int
    token_type: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples side by side.

    Args:
        inputs: input name -> (batch, length) int64.
        targets: (batch,) class ids or (batch, length) token ids, int64.
        count: how many targets the loss counts.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    count: int

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch({name: x.to(device) for name, x in self.inputs.items()}, self.targets.to(device), self.count)


def collate(examples: Examples, rows: Sequence[int], padding: Padding) -> Batch:
    """Put the examples of some rows side by side, padded on the right to the longest of them."""
    chosen = [examples.features[row] for row in rows]
    width = max(len(feature["input_ids"]) for feature in chosen)
    fills = {"input_ids": padding.token, "token_type_ids": padding.token_type}
    inputs = {name: _padded([feature[name] for feature in chosen], width, fills.get(name, 0)) for name in chosen[0]}
    if examples.task == "classification":
        targets = torch.tensor([examples.targets[row] for row in rows], dtype=torch.int64)
        return Batch(inputs, targets, len(rows))
    texts: list[Any] = [examples.targets[row] for row in rows]
    targets = _padded(texts, width, IGNORED)
    return Batch(inputs, targets, int((targets != IGNORED).sum()))


def _padded(values: Sequence[list[int]], width: int, fill: int) -> Tensor:
    return torch.tensor([value + [fill] * (width - len(value)) for value in values], dtype=torch.int64)


def loss_sum(task: Task, logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the negative log-likelihoods (nats) of all targets that count, in fp32.

    Args:
        logits: (batch, classes), or (batch, length, vocabulary).
        targets: (batch,), or (batch, length) with IGNORED where nothing counts.
    """
    if task == "classification":
        return functional.cross_entropy(logits.float(), targets, reduction="sum")
    following = targets[:, 1:]
    counted = following != IGNORED
    return functional.cross_entropy(logits[:, :-1][counted].float(), following[counted], reduction="sum")


def in_order(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Batches of rows for evaluation: longest first, every row once."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for first in range(0, len(order), size):
        yield order[first : first + size]


def shuffled(lengths: Sequence[int], size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Batches of rows for one epoch of training: random, but similar lengths together; equal for equal arguments."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    pool = size * _POOL
    batches: list[list[int]] = []
    for first in range(0, len(order), pool):
        similar = sorted(order[first : first + pool], key=lambda row: -lengths[row])
        batches += [similar[start : start + size] for start in range(0, len(similar), size)]
    return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]
