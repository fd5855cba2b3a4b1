"""What a training would take: memory, steps, bytes to send back, time; `--dry-run`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Self

import numpy as np

from fedqsn_cli.options import RecipeOptions
from fedqsn_cli.progress import Progress
from fedqsn_cli.training.steps.batching import Examples, Padding
from fedqsn_cli.training.steps.compact import Trainable
from fedqsn_cli.training.steps.journal import StepFigures
from fedqsn_cli.training.steps.loop import Surroundings, train
from fedqsn_cli.training.steps.memory import MemoryPlan, peak_bytes
from fedqsn_cli.training.steps.schedule import windows


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a training would take.

    Args:
        steps: optimizer steps. examples: examples in the data. tokens: tokens in all steps.
        parameters: numbers in the model. trained: numbers that the optimizer changes.
        weights_bytes, gradients_bytes, optimizer_bytes: memory that is held through all steps.
        bytes_per_parameter: all three, for each number in the model.
        peak_bytes: peak memory of a few steps: of this process, or on a GPU of what torch held there.
        update_bytes: size of the update's numbers.
        seconds_per_step, seconds: as steps of the tried sizes took, and between them in proportion.
    """

    steps: int
    examples: int
    tokens: int
    parameters: int
    trained: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    bytes_per_parameter: float
    peak_bytes: int
    update_bytes: int
    seconds_per_step: float
    seconds: float


class _Clock:
    """A journal that remembers."""

    def __init__(self) -> None:
        self.figures: list[StepFigures] = []

    def begin(self, done: int) -> None:
        """Nothing to do."""

    def add(self, figures: StepFigures) -> None:
        """Remember the figures of a step."""
        self.figures.append(figures)

    @property
    def seconds(self) -> list[float]:
        """Wall time of each step."""
        return [one.tokens / one.tokens_per_s for one in self.figures]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the steps of a training are, in input ids with their padding.

    Args:
        steps: each step: how long it takes depends on that. batches: its largest batch: so does its memory.
        tokens: all input ids without padding.
    """

    steps: list[int]
    batches: list[int]
    tokens: int

    @classmethod
    def of(cls, recipe: RecipeOptions, lengths: Sequence[int]) -> Self:
        """Those of a training on examples of these lengths."""
        steps, largest, tokens = list[int](), list[int](), 0
        for window in windows(recipe, lengths):
            batches = [[lengths[row] for row in rows] for rows in window]
            padded = [len(batch) * max(batch) for batch in batches]
            steps.append(sum(padded))
            largest.append(max(padded))
            tokens += sum(map(sum, batches))
        return cls(steps, largest, tokens)

    def tried(self) -> list[int]:
        """The steps to try: what is large comes once, as in a training, when the optimizer has its state."""
        by_time = sorted(range(len(self.steps)), key=self.steps.__getitem__)
        middle, smallest = by_time[len(by_time) // 2], by_time[0]
        most_memory, longest = (max(by_time, key=sizes.__getitem__) for sizes in (self.batches, self.steps))
        return [middle, *dict.fromkeys((most_memory, longest)), middle, smallest]

    def seconds(self, tried: Sequence[int], seconds: Sequence[float]) -> float:
        """Time of all steps, from that of some."""
        by_size = dict[int, list[float]]()
        for step, taken in zip(tried, seconds, strict=True):
            by_size.setdefault(self.steps[step], []).append(taken)
        known = sorted(by_size)
        return float(np.interp(self.steps, known, [fmean(by_size[size]) for size in known]).sum())


def measured(
    model: Any,
    examples: Examples,
    trainable: Trainable,
    recipe: RecipeOptions,
    padding: Padding,
    update_bytes: int,
    progress: Progress,
    tokens_at_once: int | None = None,
) -> Estimate:
    """Make a few steps with a model, which is of no use afterwards, and estimate all of them."""
    plan, lengths, clock = MemoryPlan.of(model, trainable, recipe), examples.lengths, _Clock()
    sizes = Sizes.of(recipe, lengths)
    tried, steps = sizes.tried(), len(sizes.steps)
    wanted = {step: window for step, window in enumerate(windows(recipe, lengths)) if step in tried}
    few = replace(recipe, max_steps=len(tried))
    windows_tried = [wanted[step] for step in tried]
    around = Surroundings(journals=[clock], windows=windows_tried, tokens_at_once=tokens_at_once)
    train(model, examples, trainable, few, padding, progress, around)
    seconds = sizes.seconds(tried[1:], clock.seconds[1:])  # the first step warms up
    return Estimate(
        steps=steps,
        examples=len(examples),
        tokens=sizes.tokens,
        parameters=plan.parameters,
        trained=plan.trained,
        weights_bytes=plan.weights,
        gradients_bytes=plan.gradients,
        optimizer_bytes=plan.optimizer,
        bytes_per_parameter=round(plan.per_parameter, 2),
        peak_bytes=peak_bytes(model.device),
        update_bytes=update_bytes,
        seconds_per_step=seconds / steps,
        seconds=math.ceil(seconds * 1000) / 1000,
    )
