"""Targets of several examples as one tensor, and the loss of each task.

Losses are sums over a batch, in fp32 nats; a batch's `count` is what they are divided by. Each has the name that
transformers' own loss for the task would have.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedqsn_cli.training.data.examples import IGNORED


def whole_numbers(targets: Sequence[int]) -> Tensor:
    """Class ids: int64 [batch]."""
    return torch.tensor(targets, dtype=torch.int64)


def numbers(targets: Sequence[list[float]]) -> Tensor:
    """Values of all outputs: fp32 [batch, outputs]."""
    return torch.tensor(targets, dtype=torch.float32)


def sequences(targets: Sequence[list[int]]) -> Tensor:
    """Ids, padded with IGNORED: int64 [batch, tokens]."""
    length = max(map(len, targets))
    return torch.tensor([row + [IGNORED] * (length - len(row)) for row in targets], dtype=torch.int64)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln p(target), for logits [batch, classes]."""
    return functional.cross_entropy(logits.float(), targets, reduction="sum")


def squared_error(logits: Tensor, targets: Tensor) -> Tensor:
    """(y - target)², the mean over the outputs of an example, for logits [batch, outputs]."""
    return (logits.float() - targets).square().mean(dim=-1).sum()


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln p of each label's being there or not, the mean over labels, for logits [batch, labels]."""
    each = functional.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none")
    return each.mean(dim=-1).sum()


def token_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln p(target) at each position that counts, for logits [batch, tokens, classes]."""
    counts = targets != IGNORED
    return functional.cross_entropy(logits[counts].float(), targets[counts], reduction="sum")


def next_token_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The same for a model in which position t - 1 predicts the token at t."""
    return token_cross_entropy(logits[:, :-1], targets[:, 1:])


def entropy_of_classes(targets: Iterable[int]) -> float:
    """Cross-entropy of a model that answers with how often each class is right."""
    counts = Counter(targets)
    total = counts.total()
    return -sum(count * math.log(count / total) for count in counts.values()) / total


def entropy_of_tokens(targets: Iterable[list[int]]) -> float:
    """The same over all positions that count."""
    return entropy_of_classes(target for row in targets for target in row if target != IGNORED)


def variance(targets: Sequence[Any]) -> float:
    """Squared error of a model that answers with the means."""
    return float(numbers(targets).var(dim=0, correction=0).mean())


def entropy_of_labels(targets: Sequence[Any]) -> float:
    """Binary cross-entropy of a model that answers with how often each label is there."""
    shares = numbers(targets).mean(dim=0)
    return float(functional.binary_cross_entropy(shares, shares))
