"""Examples of a batch that are computed as if each were alone: bit for bit the same in batches of any size.

A matrix product rounds differently for another number of rows, because the library then chooses another kernel. A batch
of examples of one length, without padding, is all else that is needed: everything but linear layers treats examples
apart anyway. Models that send tokens of several examples to one expert are the exception.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode


class OneByOne(TorchFunctionMode):
    """Inside of this context, linear layers multiply every example of a batch by itself, with a kernel for its size.

    Args:
        examples: how many the batch has; the first dimension of what is multiplied, or what divides it.
    """

    def __init__(self, examples: int) -> None:
        super().__init__()
        self._examples = examples

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Take the place of `linear`, and of `addmm` as GPT-2 uses it; call everything else."""
        given = kwargs or {}
        if func is linear:
            x, weight, *rest = args
            bias = rest[0] if rest else given.get("bias")
            return self._product(x, weight.t(), bias) if self._divides(x) else func(*args, **given)
        if func is torch.addmm and not given and self._divides(args[1]):
            bias, x, weight = args
            return self._product(x, weight, bias)
        return func(*args, **given)

    def _divides(self, x: Tensor) -> bool:
        rows = x.shape[:-1].numel()
        return x.dim() > 1 and rows > 0 and rows % self._examples == 0

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x weight + bias, for x [..., inputs] and weight [inputs, outputs]."""
        apart = x.reshape(self._examples, -1, x.shape[-1])
        product = torch.bmm(apart, weight.expand(self._examples, -1, -1))
        product = product if bias is None else product + bias
        return product.reshape(*x.shape[:-1], -1)
