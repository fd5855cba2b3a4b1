"""The training loop: AdamW with linear warm-up and decay on the visible units of a proxy.

A step takes `gradient_accumulation` batches. Its loss is the mean over everything that counts in them (examples, or
tokens), so that a step of one large batch and one of several small batches are the same step.
"""

from __future__ import annotations

import inspect
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fedqsn_cli.errors import InputError
from fedqsn_cli.options import RecipeOptions
from fedqsn_cli.progress import Progress
from fedqsn_cli.training.batching import Batch, Examples, Padding, collate, loss_sum, shuffled
from fedqsn_cli.training.compact import Trainable


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


def train(
    model: Any,
    examples: Examples,
    trainable: Trainable,
    recipe: RecipeOptions,
    padding: Padding,
    progress: Progress,
) -> TrainingSummary:
    """Train a model in place.

    Args:
        model: fp32, on the device to train on.
        trainable: the part of it that is trained.
        recipe: the options; precision "bf16" is mixed precision (weights stay fp32), everything else is fp32.

    Raises:
        InputError: the loss is not finite.
    """
    optimizer = make_optimizer(trainable, recipe)
    steps = step_count(recipe, len(examples))
    losses: list[float] = []
    seen: set[int] = set()
    progress.start("training", steps, "steps")
    start = time.monotonic()
    examples_done = 0
    with repeatable(model.device, recipe.seed):
        model.train()
        for step, window in zip(range(steps), _windows(examples, recipe), strict=False):
            rate = learning_rate(recipe, step, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            losses.append(_backward(model, examples, window, recipe, padding))
            if not math.isfinite(losses[-1]):
                hint = "lower --lr, or use --precision fp32"
                raise InputError(f"the loss is {losses[-1]} at step {step + 1}", hint=hint)
            trainable.gather_gradients()
            torch.nn.utils.clip_grad_norm_(trainable.leaves, recipe.max_grad_norm)
            optimizer.step()
            trainable.scatter_values()
            seen.update(row for rows in window for row in rows)
            examples_done += sum(map(len, window))
            progress.advance(1, loss=losses[-1], examples_per_s=examples_done / (time.monotonic() - start))
        model.eval()
    progress.finish()
    tenth = max(1, steps // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    return TrainingSummary(steps, len(seen), first, last, time.monotonic() - start)


def make_optimizer(trainable: Trainable, recipe: RecipeOptions) -> torch.optim.AdamW:
    """AdamW over the leaves, in one fused kernel; biases and norms have no weight decay."""
    groups = [
        {"params": trainable.decayed, "weight_decay": recipe.weight_decay},
        {"params": trainable.undecayed, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=recipe.lr, fused=True)


def _windows(examples: Examples, recipe: RecipeOptions) -> Iterator[list[list[int]]]:
    """The batches (row numbers) of each step, epoch after epoch without end."""
    lengths, epoch = examples.lengths, 0
    while True:
        batches = shuffled(lengths, recipe.batch_size, seed=recipe.seed, epoch=epoch)
        for first in range(0, len(batches), recipe.gradient_accumulation):
            yield batches[first : first + recipe.gradient_accumulation]
        epoch += 1


def _backward(
    model: Any, examples: Examples, window: list[list[int]], recipe: RecipeOptions, padding: Padding
) -> float:
    """Accumulate the gradients of a step's batches. Returns the step's mean loss."""
    batches = [collate(examples, rows, padding) for rows in window]
    count = sum(batch.count for batch in batches)
    total = 0.0
    for batch in batches:
        loss = _loss(model, examples, batch.to(model.device), recipe.precision) / count
        torch.autograd.backward(loss)
        total += loss.item()
    return total


def _loss(model: Any, examples: Examples, batch: Batch, precision: str) -> Tensor:
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        logits = model(**batch.inputs, **extra_inputs(model)).logits
    return loss_sum(examples.task, logits, batch.targets)


def extra_inputs(model: Any) -> dict[str, Any]:
    """Arguments that keep a decoder from collecting the keys and values of past tokens, which nothing here uses."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def choose_precision(name: str, device: torch.device) -> Literal["fp32", "bf16"]:
    """The precision to train in; for "auto" mixed precision, if the hardware computes bf16 faster than fp32.

    A CPU without bf16 instructions emulates them, which is many times slower.
    """
    if name != "auto":
        return "bf16" if name == "bf16" else "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if _cpu_has_bf16() else "fp32"


def _cpu_has_bf16() -> bool:
    """Does the CPU have instructions for bf16 matrices (AVX512-BF16, AMX; on ARM what oneDNN can use)?"""
    import platform

    if platform.machine() in ("x86_64", "AMD64"):
        tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, test, bool)() for test in tests)
    test = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return test is not None and bool(test())


@contextmanager
def repeatable(device: torch.device, seed: int) -> Iterator[None]:
    """Make dropout, and on a GPU every kernel, repeatable for a seed; restores torch's settings afterwards."""
    cuda = device.type == "cuda"
    if cuda:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, at its first use
    strict, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.manual_seed(seed % 2**63)
        torch.use_deterministic_algorithms(strict or cuda, warn_only=warn or cuda)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(strict, warn_only=warn)
