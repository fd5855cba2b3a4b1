"""The training loop: an optimizer with linear warm-up and decay on what a `Trainable` holds of a model.

A step takes `gradient_accumulation` batches. Its loss is the mean over everything that counts in them (examples, or
tokens), so that a step of one large batch, one of several small batches, and one that several processes share are the
same step.
"""

from __future__ import annotations

import inspect
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedqsn_cli.checkpoint import TensorSpec
from fedqsn_cli.errors import Diverged, FormatError, InputError
from fedqsn_cli.models.architecture import Task
from fedqsn_cli.options import RecipeOptions
from fedqsn_cli.progress import Progress
from fedqsn_cli.training.steps.batching import Batch, Examples, Padding, collate, loss_sum, within
from fedqsn_cli.training.steps.compact import Trainable
from fedqsn_cli.training.steps.interrupts import held_signals
from fedqsn_cli.training.steps.journal import Journal, StepFigures
from fedqsn_cli.training.steps.memory import peak_bytes
from fedqsn_cli.training.steps.optimizers import Optimizers
from fedqsn_cli.training.steps.precision import repeatable
from fedqsn_cli.training.steps.processes import ALONE, Processes
from fedqsn_cli.training.steps.schedule import Window, learning_rate, step_count, windows
from fedqsn_cli.training.steps.states import State, StateFolder, stored_as

Backward = Callable[[Any, Task, Sequence[Batch], int, RecipeOptions], float]
"""Computes gradients: takes a model, its task, the batches of a step, the number of targets that count in them (those
of other processes included) and the recipe; returns the sum of the losses of these batches, divided by that number."""


@dataclass(frozen=True, slots=True)
class TrainingSummary:
    """The figures of a finished training.

    Args:
        steps: optimizer steps. examples: different examples that took part.
        first_loss, last_loss: mean loss in nats over the first and the last tenth of the steps.
        seconds: wall time of all steps.
    """

    steps: int
    examples: int
    first_loss: float
    last_loss: float
    seconds: float


def backward(model: Any, task: Task, batches: Sequence[Batch], count: int, recipe: RecipeOptions) -> float:
    """Accumulate the gradients of a step's batches. A `Backward`."""
    total = 0.0
    for batch in batches:
        loss = _loss(model, task, batch.to(model.device), recipe.precision) / count
        torch.autograd.backward(loss)
        total += loss.item()
    return total


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a training may have around it.

    Args:
        backward: how gradients are computed.
        processes: who shares the work.
        states: where states are kept; it is open.
        journals: who hears of each step.
        windows: the batches of each step, if not those of the recipe.
        tokens_at_once: how many tokens of a batch go through the model together, padding included; None for all. It
            bounds the memory of activations, and changes a step only by how sums are rounded.
    """

    backward: Backward = backward
    processes: Processes = ALONE
    states: StateFolder | None = None
    journals: Sequence[Journal] = ()
    windows: Sequence[Window] | None = None
    tokens_at_once: int | None = None


@dataclass(slots=True)
class History:
    """What happened so far: which rows took part (1, else 0), the loss of each step, the seconds of earlier runs."""

    rows: bytearray
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def summary(self, examples: Examples, seconds: float) -> TrainingSummary:
        """The figures of the whole training."""
        steps = len(self.losses)
        tenth = max(1, steps // 10)
        first, last = sum(self.losses[:tenth]) / tenth, sum(self.losses[-tenth:]) / tenth
        took_part = examples.texts_in(row for row, seen in enumerate(self.rows) if seen)
        return TrainingSummary(steps, took_part, first, last, seconds)


def train(
    model: Any,
    examples: Examples,
    trainable: Trainable,
    recipe: RecipeOptions,
    padding: Padding,
    progress: Progress,
    around: Surroundings | None = None,
) -> TrainingSummary:
    """Train a model in place.

    Args:
        model: on the device to train on; its weights are fp32, or bf16 for the precision "bf16-weights".
        trainable: the part of it that is trained.
        recipe: the options; precision "bf16" is mixed precision (weights stay fp32). A batch has `batch_size` examples
            for each process.
        around: processes, states, journals.

    Raises:
        Diverged: the loss is not finite. InputError: the device lacks what `recipe` asks for.
        KeyboardInterrupt: a signal came, and a state was saved.
    """
    around = around or Surroundings()
    whole = replace(recipe, batch_size=recipe.batch_size * around.processes.count)
    run = _Run(model, examples, trainable, whole, padding, around)
    with (
        repeatable(model.device, recipe.seed + around.processes.rank),
        _checkpointing(model, recipe),
        _rows_of_embeddings(model, trainable),
    ):
        model.train()
        if around.states is None:
            run.steps(progress)
        else:
            run.resume(around.states, progress)
            with held_signals() as held:
                run.steps(progress, around.states, lambda: held.any)
        model.eval()
    return run.history.summary(examples, run.seconds())


class _Run:
    """A training under way."""

    def __init__(
        self,
        model: Any,
        examples: Examples,
        trainable: Trainable,
        recipe: RecipeOptions,
        padding: Padding,
        around: Surroundings,
    ) -> None:
        self.model, self.examples, self.trainable = model, examples, trainable
        self.recipe, self.padding, self.around = recipe, padding, around
        self.optimizers = Optimizers(trainable, recipe)
        self.total = step_count(recipe, len(examples))
        self.history = History(bytearray(len(examples)))
        self._lengths = examples.lengths
        own = around.windows
        self._windows = windows(recipe, self._lengths) if own is None else iter(own)
        self._began = time.monotonic()

    def seconds(self) -> float:
        """Seconds that the training has taken, those of earlier runs included."""
        return self.history.seconds + time.monotonic() - self._began

    def steps(
        self, progress: Progress, states: StateFolder | None = None, asked: Callable[[], bool] = lambda: False
    ) -> None:
        """Make the steps that are left, or those until someone asks to stop."""
        done = len(self.history.losses)
        progress.start("training", self.total, "steps")
        if done:
            progress.advance(done)
        for journal in self.around.journals:
            journal.begin(done)
        self._began = time.monotonic()
        for window in self._windows:
            figures = self._step(window)
            for journal in self.around.journals:
                journal.add(figures)
            memory = figures.memory_bytes / 2**30
            progress.advance(1, loss=figures.loss, lr=figures.lr, tokens_per_s=figures.tokens_per_s, memory_gib=memory)
            if states is not None and self._saves(states, asked()):
                return
        progress.finish()

    def _step(self, window: Window) -> StepFigures:
        """One step of all processes."""
        begin, step = time.monotonic(), len(self.history.losses)
        rate = learning_rate(self.recipe, step, self.total)
        loss = self._gradients(window)
        if not math.isfinite(loss):
            hint = "lower --lr" if self.recipe.precision == "fp32" else "lower --lr, or use --precision fp32"
            raise Diverged(f"the loss is {loss} at step {step + 1}", hint=hint)
        norm = torch.nn.utils.clip_grad_norm_(self.trainable.leaves, self.recipe.max_grad_norm)
        self.optimizers.step(rate)
        self.trainable.drop_gradients()
        self.history.losses.append(loss)
        self._took_part(window)
        tokens = sum(self._lengths[row] for rows in window for row in rows)
        return StepFigures(
            step=step + 1,
            loss=loss,
            lr=rate,
            grad_norm=float(norm),
            tokens=tokens,
            tokens_per_s=tokens / max(1e-9, time.monotonic() - begin),
            seconds=self.seconds(),
            memory_bytes=peak_bytes(self.model.device),
        )

    def _gradients(self, window: Window) -> float:
        """Give the leaves the gradients of a step. Returns its mean loss."""
        processes = self.around.processes
        shares = [share for share in map(processes.share, window) if share]
        if (most := self.around.tokens_at_once) is not None:
            shares = [part for share in shares for part in within(share, self._lengths, most)]
        batches = [collate(self.examples, rows, self.padding) for rows in shares]
        (count,) = processes.sums(sum(batch.count for batch in batches))
        loss = self.around.backward(self.model, self.examples.task, batches, int(count), self.recipe)
        self.trainable.gather_gradients()
        processes.sum_gradients(self.trainable.leaves)
        return processes.sums(loss)[0]

    def _took_part(self, window: Window) -> None:
        for rows in window:
            for row in rows:
                self.history.rows[row] = 1

    def _saves(self, states: StateFolder, asked: bool) -> bool:
        """Save a state if it is time, or if someone asks to stop. Returns whether to stop; all processes agree."""
        step = len(self.history.losses)
        stop, due = self.around.processes.sums(asked, self.around.processes.is_first and states.due(step))
        if stop or due:
            self._save(states)
        return bool(stop)

    def _save(self, states: StateFolder) -> None:
        """Write everything that the next step depends on."""
        generators = torch.stack(self.around.processes.every(torch.get_rng_state()))
        others = {"losses": torch.tensor(self.history.losses, dtype=torch.float64), "random": generators}
        if self.model.device.type == "cuda":
            device = self.model.device
            others["random-cuda"] = torch.stack(self.around.processes.every(torch.cuda.get_rng_state(device)))
        optimizer = dict(self.optimizers.state())
        scalars = {name: value for name, value in optimizer.items() if not isinstance(value, Tensor)}
        others |= {f"optimizer.{name}": value for name, value in optimizer.items() if isinstance(value, Tensor)}
        if not self.around.processes.is_first:
            return
        leaves = [(f"leaf.{number}", leaf) for number, leaf in enumerate(self.trainable.leaves)]

        def values() -> Iterator[Tensor]:
            for _, leaf in leaves:
                with self.trainable.updating([leaf]):
                    yield leaf
            yield from others.values()

        states.save(len(self.history.losses), self.seconds(), [*leaves, *others.items()], values(), scalars)

    def _check(self, state: State) -> None:
        """Refuse a state that holds something else than `_save` writes for this training. Raises FormatError."""
        optimizer = dict(self.optimizers.state())
        alike = {f"leaf.{number}": leaf for number, leaf in enumerate(self.trainable.leaves)}
        alike |= {f"optimizer.{name}": value for name, value in optimizer.items() if isinstance(value, Tensor)}
        expected = {name: stored_as(name, like) for name, like in alike.items()}
        expected["losses"] = TensorSpec("losses", "F64", (state.step,))
        generators = {"random": torch.Generator()}
        if self.model.device.type == "cuda":
            generators["random-cuda"] = torch.Generator(self.model.device)
        for name, generator in generators.items():
            expected[name] = TensorSpec(name, "U8", (self.around.processes.count, len(generator.get_state())))
        scalars = {name for name, value in optimizer.items() if not isinstance(value, Tensor)}
        if (
            not 0 < state.step <= self.total
            or state.specs() != expected
            or state.scalars.keys() != scalars
            or not all(type(value) is int and 0 <= value <= state.step for value in state.scalars.values())
            or not bool(state.read("losses").isfinite().all())
        ):
            raise FormatError("does not fit this training", where=state.path)
        try:
            for name, generator in generators.items():
                generator.set_state(state.read(name)[self.around.processes.rank])
        except RuntimeError:
            raise FormatError("is not the state of a random generator", where=f"{state.path}: {name}") from None

    def resume(self, states: StateFolder, progress: Progress) -> None:
        """Go on from the last whole state, if there is one."""
        state = states.latest(progress, self._check)
        if state is None:
            return
        leaves, rank = self.trainable.leaves, self.around.processes.rank
        optimizer: dict[str, Tensor | float] = dict(state.scalars)
        for name, tensor in state.tensors():
            kind, _, key = name.partition(".")
            if kind == "leaf":
                leaf = leaves[int(key)]
                with self.trainable.updating([leaf]):
                    leaf.detach().copy_(tensor)
            elif kind == "optimizer":
                optimizer[key] = tensor.to(self.model.device)
            elif kind == "losses":
                self.history.losses = tensor.tolist()
            elif kind == "random":
                torch.set_rng_state(tensor[rank])
            elif kind == "random-cuda":
                torch.cuda.set_rng_state(tensor[rank], self.model.device)
        self.optimizers.restore(optimizer)
        self.history.seconds = state.seconds
        for _, window in zip(range(state.step), self._windows, strict=False):
            self._took_part(window)
        progress.note(f"going on after step {state.step} of {self.total}")


@contextmanager
def _checkpointing(model: Any, recipe: RecipeOptions) -> Iterator[None]:
    """Within this block, compute activations again instead of keeping them, where the recipe asks for it."""
    if not recipe.gradient_checkpointing:
        yield
        return
    if not getattr(model, "supports_gradient_checkpointing", False):
        what = f"{type(model).__name__} of transformers has no gradient checkpointing"
        raise InputError(what, where="--gradient-checkpointing", hint="lower --batch-size instead")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


@contextmanager
def _rows_of_embeddings(model: Any, trainable: Trainable) -> Iterator[None]:
    """Within this block, the gradient of an embedding has rows for the tokens of a batch, not for all that there are.

    A weight that other modules use, too, is left alone: sums of dense and sparse gradients are rounded otherwise.
    """
    users = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    changed = [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        and not (module.sparse or module.scale_grad_by_freq)
        and users[id(module.weight)] == 1
        and trainable.takes_rows(module.weight)
    ]
    try:
        for module in changed:
            module.sparse = True
        yield
    finally:
        for module in changed:
            module.sparse = False


def _loss(model: Any, task: Task, batch: Batch, precision: str) -> Tensor:
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        logits = model(**batch.inputs, **extra_inputs(model)).logits
    return loss_sum(task, logits, batch.targets)


def extra_inputs(model: Any) -> dict[str, Any]:
    """Arguments that keep a decoder from collecting the keys and values of past tokens, which nothing here uses."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
