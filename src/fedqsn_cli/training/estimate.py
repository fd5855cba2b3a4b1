"""What a training would take: memory, steps, bytes to send back, time; `--dry-run`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from fedqsn_cli.options import RecipeOptions
from fedqsn_cli.progress import Progress
from fedqsn_cli.training.batching import Examples, Padding
from fedqsn_cli.training.compact import Trainable
from fedqsn_cli.training.journal import StepFigures
from fedqsn_cli.training.loop import Surroundings, train
from fedqsn_cli.training.memory import MemoryPlan, peak_bytes
from fedqsn_cli.training.schedule import step_count, windows

TIMED_STEPS = 4  # the first of them warms up


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
        seconds_per_step, seconds: as the timed steps took, for as many tokens.
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
    def seconds_per_token(self) -> float:
        """Of all steps but the first, if there is another."""
        timed = self.figures[1:] or self.figures
        return sum(one.tokens / one.tokens_per_s for one in timed) / sum(one.tokens for one in timed)


def measured(
    model: Any,
    examples: Examples,
    trainable: Trainable,
    recipe: RecipeOptions,
    padding: Padding,
    update_bytes: int,
    progress: Progress,
) -> Estimate:
    """Make a few steps with a model, which is of no use afterwards, and estimate all of them."""
    plan, steps = MemoryPlan.of(model, trainable, recipe), step_count(recipe, len(examples))
    lengths, clock = examples.lengths, _Clock()
    tokens = sum(lengths[row] for window in windows(recipe, lengths) for rows in window for row in rows)
    few = replace(recipe, max_steps=min(steps, TIMED_STEPS))
    train(model, examples, trainable, few, padding, progress, Surroundings(journals=[clock]))
    seconds = clock.seconds_per_token * tokens
    return Estimate(
        steps=steps,
        examples=len(examples),
        tokens=tokens,
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
