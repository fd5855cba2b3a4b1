"""Batches of examples of similar length, padded on the right, and the loss of a batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedqsn_cli.models.architecture import Task
from fedqsn_cli.training.data.examples import IGNORED as IGNORED
from fedqsn_cli.training.data.examples import Examples as Examples
from fedqsn_cli.training.data.examples import Padding as Padding
from fedqsn_cli.training.data.stored_examples import Computed
from fedqsn_cli.training.data.tasks import TASKS

_POOL = 50  # batches, at most, whose examples are sorted by length together: little padding, and still shuffled
_POOLS = 4  # in an epoch, at least: else a batch of few data holds texts of one length, which may tell their label


@dataclass(frozen=True, slots=True)
class Batch:
    """Some examples, stacked.

    Args:
        inputs: int64 [batch, tokens] by input name.
        targets: as the task stacks them (`losses`).
        count: how many targets the loss counts.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    count: int

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch({name: x.to(device) for name, x in self.inputs.items()}, self.targets.to(device), self.count)


def collate(examples: Examples, rows: Sequence[int], padding: Padding) -> Batch:
    """Stack the examples of some rows, each input padded on the right to the longest of them."""
    fills = {"input_ids": padding.token, "decoder_input_ids": padding.token, "token_type_ids": padding.token_type}
    features = [examples.features[row] for row in rows]
    inputs = {name: _pad([feature[name] for feature in features], fills.get(name, 0)) for name in features[0]}
    targets = TASKS[examples.task].stack([examples.targets[row] for row in rows])
    count = len(rows) if targets.is_floating_point() else int((targets != IGNORED).sum())
    return Batch(inputs, targets, count)


def _pad(rows: Sequence[list[int]], fill: int) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows], dtype=torch.int64)


def loss_sum(task: Task, logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the losses of all targets that count, in fp32 nats (squared error for regression).

    Args:
        logits: [batch, outputs], or [batch, tokens, classes].
        targets: of a batch.
    """
    return TASKS[task].loss(logits, targets)


def in_order(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Batches of row numbers for evaluation: every row once, the longest first."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for first in range(0, len(order), size):
        yield order[first : first + size]


def of_one_length(examples: Examples, size: int) -> Iterator[list[int]]:
    """Batches of row numbers in which nothing is padded, the longest first; in any size in the same order of rows."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for row in sorted(range(len(examples)), key=lambda row: -examples.lengths[row]):
        alike.setdefault(tuple(map(len, examples.features[row].values())), []).append(row)
    for rows in alike.values():
        for first in range(0, len(rows), size):
            yield rows[first : first + size]


def within(rows: Sequence[int], lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Split a batch into successive parts of at most so many tokens, padding included; a row alone may have more."""
    part: list[int] = []
    longest = 0
    for row in rows:
        longest = max(longest, lengths[row])
        if part and (len(part) + 1) * longest > most:
            yield part
            part, longest = [], lengths[row]
        part.append(row)
    if part:
        yield part


def shuffled(lengths: Sequence[int], size: int, *, seed: int, epoch: int) -> Sequence[list[int]]:
    """Batches of row numbers for one epoch of training: random, with similar lengths together.

    Equal arguments give equal batches. A row takes about 8 bytes.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(len(lengths), generator=generator)
    pool = size * max(1, min(_POOL, len(lengths) // (_POOLS * size)))
    for first in range(0, len(order), pool):
        similar = sorted(order[first : first + pool].tolist(), key=lambda row: -lengths[row])
        order[first : first + pool] = torch.tensor(similar)
    numbers = torch.randperm(math.ceil(len(order) / size), generator=generator)

    def batch(place: int) -> list[int]:
        first = int(numbers[place]) * size
        rows: list[int] = order[first : first + size].tolist()
        return rows

    return Computed(len(numbers), batch)
