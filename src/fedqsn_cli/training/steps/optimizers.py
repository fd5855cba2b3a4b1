"""The optimizers of `--optimizer`, over the leaves of a `Trainable`, a part of them at a time.

An optimizer of torch or bitsandbytes changes tensors that hold the values of the leaves. Leaves have memory for them
only within `Trainable.updating`, so one optimizer for each part bounds that memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fedqsn_cli.errors import InputError
from fedqsn_cli.models.messages import first_line
from fedqsn_cli.options import OptimizerName, RecipeOptions
from fedqsn_cli.training.steps.compact import Trainable

PART_BYTES = 16 << 20
"""Values of leaves that are in memory at the same time, unless a single leaf is larger."""

STATE_BYTES: dict[OptimizerName, float] = {"adamw": 8, "adamw-8bit": 2 + 2 * 4 / 256, "sgd": 0}
"""Bytes of optimizer state for each fp32 number that is trained: two moments; in 8 bits, 256 share an fp32 scale."""


class Optimizers:
    """One optimizer for each part of the leaves; biases and norms have no weight decay."""

    def __init__(self, trainable: Trainable, recipe: RecipeOptions) -> None:
        """Make the optimizers.

        Raises:
            InputError: the device cannot compute what `recipe.optimizer` names.
        """
        self._trainable = trainable
        self._leaves = trainable.leaves
        if recipe.optimizer == "adamw-8bit" and self._leaves:
            _check_8bit(self._leaves[0])
        self._parts = [
            (part, make_optimizer(part, decay, recipe))
            for leaves, decay in ((trainable.decayed, recipe.weight_decay), (trainable.undecayed, 0.0))
            for part in _parts(leaves)
        ]

    def step(self, rate: float) -> None:
        """Change the model with a learning rate, by the gradients that the leaves have."""
        for part, optimizer in self._parts:
            for group in optimizer.param_groups:
                group["lr"] = rate
            with self._trainable.updating(part):
                optimizer.step()

    def state(self) -> Iterator[tuple[str, Tensor | float]]:
        """What is kept of each leaf between two steps, under names that `restore` knows."""
        where = {id(leaf): number for number, leaf in enumerate(self._leaves)}
        for part, optimizer in self._parts:
            for leaf in part:
                for key, value in optimizer.state[leaf].items():
                    yield f"{where[id(leaf)]}.{key}", value

    def restore(self, state: dict[str, Tensor | float]) -> None:
        """Go on from what `state` gave."""
        numbers = {id(leaf): f"{number}." for number, leaf in enumerate(self._leaves)}
        by_leaf: dict[str, dict[str, Any]] = {prefix: {} for prefix in numbers.values()}
        for name, value in state.items():
            number, _, key = name.partition(".")
            by_leaf[f"{number}."][key] = value
        for part, optimizer in self._parts:
            for leaf in part:
                optimizer.state[leaf] = by_leaf[numbers[id(leaf)]]


def make_optimizer(leaves: list[Tensor], weight_decay: float, recipe: RecipeOptions) -> torch.optim.Optimizer:
    """An optimizer over some leaves, in one fused kernel.

    Its state is made at once, as its first step would, but in one piece: between activations that come and go, it would
    scatter free memory. So it is also known, before any step, what a state on disk must hold.
    """
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(leaves, lr=recipe.lr, weight_decay=weight_decay, fused=True)
    if recipe.optimizer == "adamw-8bit":
        adamw_8bit: Any = _bitsandbytes().optim.AdamW8bit(leaves, lr=recipe.lr, weight_decay=weight_decay)
        for position, leaf in enumerate(leaves):
            adamw_8bit.init_state(adamw_8bit.param_groups[0], leaf, 0, position)
        optimizer: torch.optim.Optimizer = adamw_8bit
        return optimizer
    adamw = torch.optim.AdamW(leaves, lr=recipe.lr, weight_decay=weight_decay, fused=True)
    for leaf in leaves:
        step = torch.zeros((), dtype=torch.float32, device=leaf.device)
        adamw.state[leaf] = {"step": step, "exp_avg": torch.zeros_like(leaf), "exp_avg_sq": torch.zeros_like(leaf)}
    return adamw


def _parts(leaves: list[Tensor]) -> Iterator[list[Tensor]]:
    """Successive leaves of at most PART_BYTES together."""
    part: list[Tensor] = []
    size = 0
    for leaf in leaves:
        nbytes = leaf.numel() * leaf.element_size()
        if part and size + nbytes > PART_BYTES:
            yield part
            part, size = [], 0
        part.append(leaf)
        size += nbytes
    if part:
        yield part


def _bitsandbytes() -> Any:
    """bitsandbytes, without what it logs about kernels that it does not find."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes


def _check_8bit(like: Tensor) -> None:
    """Take one step on a small tensor of this dtype, on this device. Raises InputError."""
    values = torch.zeros(8192, dtype=like.dtype, device=like.device)
    values.grad = torch.ones_like(values)
    try:
        _bitsandbytes().optim.AdamW8bit([values], lr=1.0).step()
    except Exception as error:  # whatever a library raises that lacks a kernel
        hint = "use --optimizer adamw"
        what = f"bitsandbytes cannot compute 8-bit AdamW on {like.device.type} ({first_line(error)})"
        raise InputError(what, where="--optimizer", hint=hint) from None
    if not bool((values != 0).all()):
        raise InputError(f"bitsandbytes computes no 8-bit AdamW on {like.device.type}", where="--optimizer")
