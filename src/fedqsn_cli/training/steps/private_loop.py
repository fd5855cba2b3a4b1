"""Training with differential privacy of the examples: DP-SGD (Abadi et al. 2016, arXiv 1607.00133) through opacus.

    batch    every example with probability q, independently            Poisson sampling, as the accountant assumes
    g_i      gradient of example i, over what is trained of visible units
    g        (Σ g_i · min(1, C / ‖g_i‖₂) + N(0, (z C)²)) / (q N)
    step     AdamW with g

z is the smallest noise multiplier for which the accountant finds ε at δ after all steps. Two data sets that differ in
one example, which one of them lacks, are what the guarantee is about. The number of examples N is not hidden.

Batches and noise come from the operating system's random bytes, not from the seed: whoever knew them could undo them.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fedqsn_cli.artifacts.manifests import TrainingPrivacy
from fedqsn_cli.errors import Diverged, InputError
from fedqsn_cli.options import RecipeOptions
from fedqsn_cli.options.privacy import PrivacyOptions
from fedqsn_cli.progress import Progress
from fedqsn_cli.training.steps.batching import Batch, Examples, Padding, collate, loss_sum
from fedqsn_cli.training.steps.compact import Trainable
from fedqsn_cli.training.steps.loop import TrainingSummary, extra_inputs
from fedqsn_cli.training.steps.optimizers import Optimizers
from fedqsn_cli.training.steps.precision import repeatable
from fedqsn_cli.training.steps.schedule import learning_rate, step_count
from fedqsn_cli.training.steps.secure_random import normals, uniforms

ACCOUNTANT: Literal["rdp"] = (
    "rdp"  # Rényi differential privacy (arXiv 1702.07476): an upper bound for any number of steps
)
_COLLECTING = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_POSITION_TABLES = ("position_embeddings", "wpe")
_TOLERANCE = 1e-3  # of the sum of per-example gradients against the gradient, relative to the parameter's
_ROUNDING = 1e-5  # the same relative to those of the whole model: some parameters' gradients are zero but for rounding


def require_opacus() -> None:
    """Refuse to go on without opacus. Raises InputError."""
    if importlib.util.find_spec("opacus") is None:
        raise InputError("needs opacus", where="--dp-epsilon", hint="install fedqsn-cli[dp]")


def plan_privacy(privacy: PrivacyOptions, recipe: RecipeOptions, examples: int) -> TrainingPrivacy | None:
    """The noise that keeps training within the wanted ε; None where none is wanted.

    Args:
        examples: N, the number of training examples.

    Raises:
        InputError: opacus is missing, δ is too large for so many examples, or no noise is enough.
    """
    if privacy.dp_epsilon is None or privacy.dp_delta is None or privacy.dp_clip is None:
        return None
    require_opacus()
    if privacy.dp_delta * examples >= 1:
        what = f"{privacy.dp_delta:g} is not less than 1 / {examples} examples, so it protects none of them"
        raise InputError(what, where="--dp-delta", hint=f"give {0.1 / examples:.1g} or less")
    rate = min(1.0, recipe.batch_size * recipe.gradient_accumulation / examples)
    steps = step_count(recipe, examples)
    multiplier, epsilon = _noise(privacy.dp_epsilon, privacy.dp_delta, rate, steps)
    return TrainingPrivacy(
        epsilon=epsilon,
        delta=privacy.dp_delta,
        clip=privacy.dp_clip,
        noise_multiplier=multiplier,
        sampling_rate=rate,
        steps=steps,
        accountant=ACCOUNTANT,
    )


def _noise(epsilon: float, delta: float, rate: float, steps: int) -> tuple[float, float]:
    """The noise multiplier, and the ε that it gives. Raises InputError."""
    from opacus.accountants import create_accountant
    from opacus.accountants.utils import get_noise_multiplier

    try:
        multiplier = get_noise_multiplier(
            target_epsilon=epsilon, target_delta=delta, sample_rate=rate, steps=steps, accountant=ACCOUNTANT
        )
    except ValueError:
        raise InputError(
            f"no noise gives {epsilon:g} in {steps} steps", where="--dp-epsilon", hint="train fewer steps"
        ) from None
    accountant = create_accountant(mechanism=ACCOUNTANT)
    accountant.history = [(multiplier, rate, steps)]
    found = float(accountant.get_epsilon(delta=delta))
    return float(multiplier), found if found > 0 else epsilon  # its bound falls below 0 where noise is huge


def train_privately(
    model: Any,
    examples: Examples,
    trainable: Trainable,
    recipe: RecipeOptions,
    privacy: TrainingPrivacy,
    padding: Padding,
    progress: Progress,
) -> TrainingSummary:
    """Train a model in place, in fp32.

    Args:
        trainable: the part of it that is trained; its leaves' gradients are linear in those of the parameters.
        privacy: made by `plan_privacy` for the same recipe and examples.

    Raises:
        InputError: opacus cannot tell the examples' gradients in this model apart, or the loss is not finite.
    """
    model.train()
    check_supported(model)
    optimizers, start = Optimizers(trainable, recipe), time.monotonic()
    losses: list[float] = []
    progress.start("training", privacy.steps, "steps")
    with repeatable(model.device, recipe.seed), PerExample(model, trainable, privacy.clip) as per_example:
        for step in range(privacy.steps):
            rows = np.flatnonzero(uniforms(len(examples)) < privacy.sampling_rate).tolist()
            loss = sum(per_example.add(_losses(model, examples, part, padding)) for part in _parts(rows, recipe))
            if not math.isfinite(loss):
                raise Diverged(f"the loss is {loss} at step {step + 1}", hint="lower --lr")
            per_example.finish(privacy, len(examples))
            rate = learning_rate(recipe, step, privacy.steps)
            optimizers.step(rate)
            trainable.drop_gradients()
            losses += [loss / len(rows)] if rows else []
            progress.advance(1, lr=rate, **({"loss": losses[-1]} if losses else {}))
        model.eval()
    progress.finish()
    tenth = max(1, len(losses) // 10)
    first, last = (math.fsum(part) / max(1, len(part)) for part in (losses[:tenth], losses[-tenth:]))
    return TrainingSummary(privacy.steps, len(examples), first, last, time.monotonic() - start)


def _parts(rows: list[int], recipe: RecipeOptions) -> Iterator[list[int]]:
    """As many examples as fit into memory together, at a time: how they are split changes nothing."""
    for first in range(0, len(rows), recipe.batch_size):
        yield rows[first : first + recipe.batch_size]


def _losses(model: Any, examples: Examples, rows: list[int], padding: Padding) -> Tensor:
    """The loss of each example, the mean over what counts in it: [examples]."""
    batch: Batch = collate(examples, rows, padding).to(model.device)
    logits = model(**batch.inputs, **extra_inputs(model), **_positions(model, batch)).logits
    counts = [collate(examples, [row], padding).count for row in rows]
    parts = range(len(rows))
    return torch.stack(
        [loss_sum(examples.task, logits[i : i + 1], batch.targets[i : i + 1]) / counts[i] for i in parts]
    )


def _positions(model: Any, batch: Batch) -> dict[str, Tensor]:
    """Position ids for each example: a model makes one row for all of them, whose gradient belongs to no single one.

    RoBERTa and its like, whose table has a padding id, count otherwise, and for each example.
    """
    tables = [module for name, module in model.named_modules() if name.endswith(_POSITION_TABLES)]
    if not any(isinstance(table, nn.Embedding) and table.padding_idx is None for table in tables):
        return {}
    ids = batch.inputs["input_ids"]
    return {"position_ids": torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)}


def check_supported(model: Any) -> None:
    """Refuse a model, in training mode, in which opacus cannot know the gradients of single examples.

    Raises:
        InputError: it cannot; the message names the layer or parameter.
    """
    from opacus.validators import ModuleValidator

    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and names.setdefault(id(parameter), name) != name:
            what = f"{name} is tied to {names[id(parameter)]}, whose gradients opacus does not tell apart"
            raise InputError(what, where="--dp-epsilon")
    if getattr(model, "is_gradient_checkpointing", False):
        raise InputError("does not go with gradient checkpointing", where="--dp-epsilon")
    errors = ModuleValidator.validate(model, strict=False)
    if errors:
        raise InputError(f"opacus cannot train this model ({str(errors[0]).splitlines()[0]})", where="--dp-epsilon")
    for name, module in model.named_modules():
        for parameter, value in module.named_parameters(recurse=False):
            if value.requires_grad and not _has_rule(module):
                raise _unclear(f"{name}.{parameter}")


def _has_rule(module: nn.Module) -> bool:
    """Whether opacus can compute gradients of examples: for layers that it knows, and for functions of one tensor.

    A stack of experts, which gets tokens of several examples and where to send them, is neither.
    """
    from opacus import GradSampleModule

    inputs = inspect.signature(module.forward).parameters.values()
    return type(module) in GradSampleModule.GRAD_SAMPLERS or sum(one.kind not in _COLLECTING for one in inputs) == 1


class PerExample:
    """The clipped gradients of single examples, added up batch by batch; a context in which opacus watches a model.

    Args:
        clip: C.
    """

    def __init__(self, model: Any, trainable: Trainable, clip: float) -> None:
        self._model = model
        self._trainable = trainable
        self._clip = clip
        self._names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._sums: dict[str, Tensor] = {}
        self._checked = False
        self._took_part: dict[str, Tensor] = {}  # parameters, and until they were checked the gradients of all examples
        self.norms: list[float] = []
        """‖g_i‖₂ of the examples of this step, before they were clipped."""

    def __enter__(self) -> PerExample:
        from opacus import GradSampleModule

        try:
            self._watched: Any = GradSampleModule(self._model, loss_reduction="sum", strict=False)
        except (NotImplementedError, ValueError) as error:
            what = f"opacus cannot train this model ({str(error).splitlines()[0]})"
            raise InputError(what, where="--dp-epsilon") from None
        self._hooks = [p.register_hook(partial(self._saw, name)) for name, p in self._names.items()]
        self._clear()
        return self

    def __exit__(self, *_: object) -> None:
        self._watched.to_standard_module()
        for hook in self._hooks:
            hook.remove()
        for parameter in self._names.values():
            parameter.grad = None

    def _saw(self, name: str, gradient: Tensor) -> None:
        """Remember that a parameter has a gradient, before a `Trainable` takes it away."""
        self._took_part[name] = gradient.new_empty(0) if self._checked else gradient.detach()

    def add(self, losses: Tensor) -> float:
        """Add the clipped gradient of each example's loss, [examples]. Returns the sum of the losses."""
        torch.autograd.backward(losses.sum())
        samples = {name: self._sample(name, parameter, len(losses)) for name, parameter in self._names.items()}
        if not self._checked:
            self._check_sums(samples)
        norms = [self._norm(samples, row) for row in range(len(losses))]
        factors = losses.new_tensor([min(1.0, self._clip / norm) if norm > 0 else 1.0 for norm in norms])
        for name, sample in samples.items():
            if sample is not None:
                self._sums[name] += torch.tensordot(factors, sample, dims=1)
        self.norms += norms
        for parameter in self._names.values():
            parameter.grad_sample = None
            parameter.grad = None
        self._trainable.drop_gradients()
        self._took_part.clear()
        return float(losses.sum().item())

    def finish(self, privacy: TrainingPrivacy, examples: int) -> None:
        """Give the leaves their gradient g for the step, and begin the next sum."""
        for name, parameter in self._names.items():
            parameter.grad = self._sums[name]
        self._trainable.gather_gradients()
        expected = privacy.sampling_rate * examples
        for leaf in self._trainable.leaves:
            assert leaf.grad is not None
            noise = torch.from_numpy(normals(leaf.numel())).reshape(leaf.shape).to(leaf.device)
            leaf.grad = (leaf.grad + noise * (privacy.noise_multiplier * self._clip)) / expected
        self._clear()

    def _clear(self) -> None:
        self._sums = {name: torch.zeros_like(parameter) for name, parameter in self._names.items()}
        self.norms = []

    def _sample(self, name: str, parameter: Any, examples: int) -> Tensor | None:
        """Gradients of single examples, [examples, ...]; None where the parameter took no part.

        Raises:
            InputError: opacus did not tell the examples apart.
        """
        sample: Tensor | None = parameter.grad_sample
        if sample is None and name not in self._took_part:
            return None
        if not isinstance(sample, Tensor) or sample.shape != (examples, *parameter.shape):
            raise _unclear(name)
        return sample

    def _check_sums(self, samples: dict[str, Tensor | None]) -> None:
        """Compare the sums of the first gradients with what autograd computes. Raises InputError."""
        sizes = {name: float(sample.norm()) for name, sample in samples.items() if sample is not None}
        whole = math.hypot(*sizes.values())
        for name, size in sizes.items():
            sample, gradient = samples[name], self._took_part.get(name)
            assert sample is not None
            error = sample.sum(dim=0) if gradient is None else sample.sum(dim=0) - gradient
            if float(error.norm()) > _TOLERANCE * size + _ROUNDING * whole:
                raise _unclear(name)
        self._checked = True

    def _norm(self, samples: dict[str, Tensor | None], row: int) -> float:
        """‖g_i‖₂ over the leaves, of one example."""
        for name, parameter in self._names.items():
            sample = samples[name]
            parameter.grad = None if sample is None else sample[row]
        self._trainable.gather_gradients()
        grads = [leaf.grad for leaf in self._trainable.leaves if leaf.grad is not None]
        return float(torch.stack([torch.linalg.vector_norm(grad) for grad in grads]).norm())


def _unclear(name: str) -> InputError:
    return InputError(f"opacus does not tell the gradients of examples apart in {name}", where="--dp-epsilon")
