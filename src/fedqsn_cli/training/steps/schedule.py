"""When a training does what: its steps, the examples of each step, and the learning rate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from fedqsn_cli.options import RecipeOptions
from fedqsn_cli.training.steps.batching import shuffled

Window = Sequence[list[int]]
"""The batches of one step, each of them row numbers."""


def step_count(recipe: RecipeOptions, examples: int) -> int:
    """Optimizer steps for a number of examples, at least one."""
    batches = math.ceil(examples / recipe.batch_size)
    steps = max(1, math.ceil(recipe.epochs * math.ceil(batches / recipe.gradient_accumulation)))
    return min(steps, recipe.max_steps or steps)


def learning_rate(recipe: RecipeOptions, step: int, steps: int) -> float:
    """Learning rate of a step (0 .. steps - 1): linear warm-up, then linear decay; never 0."""
    warmup = math.ceil(recipe.warmup_ratio * steps)
    if step < warmup:
        return recipe.lr * (step + 1) / (warmup + 1)
    return recipe.lr * (steps - step) / max(1, steps - warmup)


def windows(recipe: RecipeOptions, lengths: Sequence[int]) -> Iterator[Window]:
    """The batches of each step of a training, epoch after epoch. Equal arguments give equal batches."""
    return itertools.islice(_endless(recipe, lengths), step_count(recipe, len(lengths)))


def _endless(recipe: RecipeOptions, lengths: Sequence[int]) -> Iterator[Window]:
    for epoch in itertools.count():
        batches = shuffled(lengths, recipe.batch_size, seed=recipe.seed, epoch=epoch)
        for first in range(0, len(batches), recipe.gradient_accumulation):
            yield batches[first : first + recipe.gradient_accumulation]
