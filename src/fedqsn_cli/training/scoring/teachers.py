"""Soft targets: a teacher's probabilities, computed beforehand, and the divergence of a student from them.

    text ──teacher──▶ probabilities       of the classes, or of the next token at every position: the K likeliest, and
                                          all others together
    KL(teacher ‖ student) = Σ p log(p / q)     over the same K + 1 events, in nats

Teachers are in memory one after the other, and none of them while the student is trained. The examples of all teachers
go through one training loop: the target of an example is its number, by which `Distillation` finds its soft targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedqsn_cli.models.architecture import Task
from fedqsn_cli.options import RecipeOptions
from fedqsn_cli.progress import Progress
from fedqsn_cli.training.data.tables import Rows, Table
from fedqsn_cli.training.steps.batching import IGNORED, Batch, Examples, Padding, collate, in_order
from fedqsn_cli.training.steps.loop import extra_inputs

TAUGHT_TASKS: tuple[Task, ...] = ("classification", "causal-lm")
"""In which a model answers with probabilities."""

LIKELIEST = 1024
"""Tokens that are kept for each position at most; the others count together. A flat distribution needs many."""

MOST_KEPT_OUT = 200  # examples: enough to compare students by

MOST_BYTES = 1 << 29  # of one teacher's soft targets; where texts are many and long, fewer tokens are kept
_LEAST = 1e-6  # the least probability of all others together: its logarithm is finite


@dataclass(frozen=True, slots=True)
class Unlabelled:
    """Data for a classifier whose labels do not count; texts without any are enough."""

    data: Rows

    @property
    def path(self) -> Path:
        """The file."""
        return self.data.path

    @property
    def rows(self) -> int:
        """Its number of rows."""
        return self.data.rows

    def parts(self) -> Iterator[Table]:
        """Its rows with a label that any model has."""
        for part in self.data.parts():
            yield replace(part, columns=part.columns | {"label": [0] * part.rows})


@dataclass(frozen=True, slots=True)
class SoftTargets:
    """A teacher's probabilities for one example.

    Args:
        events: ids of the likeliest tokens, int32 [positions, K]; None for classes, which are all there.
        probabilities: of the events, fp32 [positions, K], or of the classes, [1, classes].
    """

    events: Tensor | None
    probabilities: Tensor


@torch.no_grad()
def listen(model: Any, examples: Examples, batch_size: int, padding: Padding, progress: Progress) -> list[SoftTargets]:
    """A teacher's probabilities for every example, in their order.

    Args:
        model: in evaluation mode, on its device.
        examples: of a language model only the positions before a target that counts are asked about.
    """
    progress.start("asking the teacher", len(examples), "examples")
    kept = kept_tokens(sum(examples.lengths))
    found: dict[int, SoftTargets] = {}
    for rows in in_order(examples.lengths, batch_size):
        batch = collate(examples, rows, padding).to(model.device)
        logits = model(**batch.inputs, **extra_inputs(model)).logits.float()
        for place, row in enumerate(rows):
            found[row] = _likeliest(examples.task, logits[place], batch.targets[place], kept)
        progress.advance(len(rows))
    progress.finish()
    return [found[row] for row in range(len(examples))]


def kept_tokens(positions: int) -> int:
    """K, for so many positions: an id of 4 bytes and a probability of 4 for each token."""
    return max(16, min(LIKELIEST, MOST_BYTES // (8 * max(1, positions))))


def _likeliest(task: Task, logits: Tensor, targets: Tensor, kept: int) -> SoftTargets:
    if task == "classification":
        return SoftTargets(None, logits.softmax(dim=-1)[None].cpu())
    probabilities = logits[:-1][targets[1:] != IGNORED].softmax(dim=-1)
    best = probabilities.topk(min(kept, probabilities.shape[-1]), dim=-1)
    return SoftTargets(best.indices.int().cpu(), best.values.cpu())


@dataclass(frozen=True, slots=True)
class Lesson:
    """Examples, their teacher's soft targets, and how much they count."""

    examples: Examples
    soft_targets: Sequence[SoftTargets]
    weight: float

    def divided(self) -> tuple[Lesson, Lesson]:
        """Without a tenth of its examples, and that tenth; a lesson of fewer than ten is whole in both."""
        count = len(self.examples)
        if count < 10:
            return self, self
        kept_out = range(0, count, 10)[:MOST_KEPT_OUT]
        return self._some(sorted(set(range(count)) - set(kept_out))), self._some(kept_out)

    def _some(self, rows: Sequence[int]) -> Lesson:
        targets = [self.soft_targets[row] for row in rows]
        return replace(self, examples=self.examples.some(rows), soft_targets=targets)


class Distillation:
    """The loss of a student of several teachers: Σ over teachers of weight · mean KL(teacher ‖ student).

    The examples of one are repeated until all have as many, so that batches hold examples of each.
    """

    def __init__(self, taught: Sequence[Lesson]) -> None:
        """Put the examples of all teachers together."""
        most = max(len(one.examples) for one in taught)
        self._soft_targets: list[SoftTargets] = []
        self._weights: list[float] = []
        features: list[dict[str, list[int]]] = []
        targets: list[Any] = []
        for one in taught:
            for number in range(most):
                row = number % len(one.examples)
                features.append(one.examples.features[row])
                targets.append(_numbered(one.examples.targets[row], len(self._soft_targets)))
                self._soft_targets.append(one.soft_targets[row])
                self._weights.append(one.weight)
        self.examples: Examples = replace(taught[0].examples, features=features, targets=targets, skipped=0)
        self._balance(most, len(taught))

    def _balance(self, most: int, teachers: int) -> None:
        """Let each teacher count by its weight, however many positions its texts have."""
        sizes = [
            sum(len(one.probabilities) for one in self._soft_targets[number * most : (number + 1) * most])
            for number in range(teachers)
        ]
        for row in range(len(self._weights)):
            self._weights[row] *= sum(sizes) / sizes[row // most]

    def backward(self, model: Any, task: Task, batches: Sequence[Batch], count: int, recipe: RecipeOptions) -> float:
        """Accumulate the gradients of a step's batches; see `training.loop.Backward`."""
        total = 0.0
        for batch in batches:
            on_device = batch.to(model.device)
            logits = model(**on_device.inputs, **extra_inputs(model)).logits.float()
            loss = self._divergence(task, logits, on_device.targets) / count
            torch.autograd.backward(loss)
            total += loss.item()
        return total

    @torch.no_grad()
    def mean(self, model: Any, batch_size: int, padding: Padding) -> float:
        """The loss of a model in evaluation mode, on all examples."""
        examples, total, count = self.examples, 0.0, 0
        for rows in in_order(examples.lengths, batch_size):
            batch = collate(examples, rows, padding).to(model.device)
            logits = model(**batch.inputs, **extra_inputs(model)).logits.float()
            total += self._divergence(examples.task, logits, batch.targets).item()
            count += batch.count
        return total / count

    def _divergence(self, task: Task, logits: Tensor, targets: Tensor) -> Tensor:
        """Sum of the weighted divergences of a batch."""
        if task == "classification":
            rows, sizes, student = targets, [1] * len(targets), logits
        else:
            rows, counts = targets[:, 1:].max(dim=1).values, targets[:, 1:] != IGNORED
            sizes, student = counts.sum(dim=1).tolist(), logits[:, :-1][counts]
        weighted = [
            self._weights[row] * _divergences(self._soft_targets[row], each.log_softmax(dim=-1)).sum()
            for row, each in zip(rows.tolist(), torch.split(student, sizes), strict=True)
        ]
        return torch.stack(weighted).sum()


def _numbered(target: Any, number: int) -> Any:
    """A target in which the number of its example stands for whatever counts."""
    if isinstance(target, list):
        return [number if token != IGNORED else IGNORED for token in target]
    return number


def _divergences(targets: SoftTargets, student: Tensor) -> Tensor:
    """KL(teacher ‖ student) at each position of an example, in nats.

    Args:
        student: log-probabilities of all tokens or classes, [positions, vocabulary].
    """
    probabilities = targets.probabilities.to(student.device)
    if targets.events is not None:
        events = targets.events.long().to(student.device)
        student, probabilities = _with_the_rest(student.gather(1, events), probabilities)
    return (torch.xlogy(probabilities, probabilities) - probabilities * student).sum(dim=1)


def _with_the_rest(student: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a student and probabilities of a teacher, [positions, K], with all others: [.., K + 1]."""
    others = (1 - probabilities.sum(dim=1, keepdim=True)).clamp_min(_LEAST)
    left = (1 - student.exp().sum(dim=1, keepdim=True)).clamp_min(_LEAST).log()
    return torch.cat([student, left], dim=1), torch.cat([probabilities, others], dim=1)
