"""What an attack on the function is: weights to start from, which need no data, or a way to train them with some."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from fedqsn_cli.auditing.recovery.attackers.assembly import Assembly, State
from fedqsn_cli.models.torch_model import Loaded
from fedqsn_cli.options import RecipeOptions
from fedqsn_cli.progress import Progress
from fedqsn_cli.training.steps.batching import Examples, Padding

BATCH, LEAST_STEPS, MOST_STEPS = 16, 40, 600


@dataclass(frozen=True, slots=True)
class Start:
    """Weights that an attacker puts together without an example.

    Args:
        name: as reports call it. source: who describes the attack.
        applies: can it be tried on these proxies?
        build: makes the weights anew each time, since training moves the tensors themselves.
        filled: the public base is used where no proxy shows anything; such weights learn well, so that they are trained
            even if others have less loss before.
    """

    name: Callable[[Assembly], str]
    source: str
    applies: Callable[[Assembly], bool]
    build: Callable[[Assembly], State]
    filled: bool = False


@dataclass(frozen=True, slots=True)
class TrainingInputs:
    """What a training may use.

    Args:
        build: the weights that it starts from, anew each time.
        examples: the attacker's public examples.
        holes: True where no proxy shows a weight, by the model's own names; {} where there are none.
        teacher: the first proxy as it was sent.
    """

    build: Callable[[], Loaded]
    examples: Examples
    padding: Padding
    holes: Callable[[], Mapping[str, Tensor]]
    teacher: Callable[[], Loaded]
    progress: Progress

    def recipe(self, rate: float) -> RecipeOptions:
        """Three times through the examples at least, and some steps at least, but not for ever."""
        batches = math.ceil(len(self.examples) / BATCH)
        epochs = max(3, math.ceil(LEAST_STEPS / batches))
        return RecipeOptions(epochs=epochs, max_steps=MOST_STEPS, lr=rate, batch_size=BATCH, precision="fp32")


@dataclass(frozen=True, slots=True)
class Trained:
    """A model that an attacker trained, and the optimizer steps that it took."""

    loaded: Loaded
    steps: int


@dataclass(frozen=True, slots=True)
class Training:
    """A way to train weights with public examples.

    Args:
        name: as reports call it. source: who describes the attack.
        rates: learning rates that are tried; the one that serves the attacker best counts.
        run: trains with one rate; None where it has nothing to train.
        of_base: can it be tried on the public base, which has neither holes nor a proxy?
    """

    name: str
    source: str
    rates: tuple[float, ...]
    run: Callable[[TrainingInputs, float], Trained | None]
    of_base: bool = True
