"""Train visible units only: small tensors that hold nothing else stand in for the parameters in the optimizer.

    parameter.grad ──gather──▶ leaf.grad ──clip, AdamW──▶ leaf ──scatter──▶ parameter

Hidden units have no gradient, no weight decay and no optimizer state, because they are not there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedqsn_cli.planning.tensor_plan import UnitAxis


@dataclass(frozen=True, slots=True)
class Piece:
    """The visible part of a parameter, or of one slice of it.

    Args:
        parameter: the whole parameter, contiguous.
        part: indices of leading dimensions that lead to the slice; () for the whole.
        axis: what is visible in the slice, seen as (rows, cols): rows, columns or single elements.
        index: (visible,) int64 positions of them.
        leaf: (visible, cols), (rows, visible) or (visible,): what the optimizer trains.
    """

    parameter: Tensor
    part: tuple[int, ...]
    axis: UnitAxis
    index: Tensor
    leaf: Tensor

    @classmethod
    def of(cls, parameter: Tensor, part: tuple[int, ...], axis: UnitAxis, index: Tensor) -> Piece:
        """A piece with its leaf, gathered from the parameter."""
        index = index.to(parameter.device)
        return cls(parameter, part, axis, index, _gather(parameter.detach(), part, axis, index))

    def pull(self) -> None:
        """Take the gradient of the leaf from that of the parameter."""
        whole = self.parameter.grad
        self.leaf.grad = None if whole is None else _gather(whole, self.part, self.axis, self.index)

    def push(self) -> None:
        """Put the leaf's values into the parameter."""
        view = _matrix(self.parameter.detach(), self.part, self.axis)
        view.index_copy_(_dimension(self.axis), self.index, self.leaf.detach())


def _matrix(whole: Tensor, part: tuple[int, ...], axis: UnitAxis) -> Tensor:
    """A slice as (rows, cols), or as (elements,)."""
    piece = whole[part]
    return piece.view(-1) if axis == "element" else piece.view(-1, piece.shape[-1])


def _gather(whole: Tensor, part: tuple[int, ...], axis: UnitAxis, index: Tensor) -> Tensor:
    return _matrix(whole.contiguous(), part, axis).index_select(_dimension(axis), index)


def _dimension(axis: UnitAxis) -> int:
    return 1 if axis == "column" else 0


def cut(mask: Tensor, part: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], UnitAxis, Tensor]]:
    """Cut a bool mask into pieces of whole rows or whole columns, slice by slice, else into single elements."""
    if mask.ndim < 2:
        yield part, "element", mask.reshape(-1).nonzero().flatten()
        return
    matrix = mask.reshape(-1, mask.shape[-1])
    if bool((matrix == matrix[:, :1]).all()):
        yield part, "row", matrix[:, 0].nonzero().flatten()
    elif bool((matrix == matrix[:1]).all()):
        yield part, "column", matrix[0].nonzero().flatten()
    elif mask.ndim == 2:
        yield part, "element", mask.reshape(-1).nonzero().flatten()
    else:
        for number, piece in enumerate(mask):
            yield from cut(piece, (*part, number))


class VisibleParameters:
    """What the optimizer sees of a model: parameters without hidden units as they are, leaves for the others."""

    def __init__(self, model: Any, masks: Mapping[str, Tensor]) -> None:
        self.decayed: list[Tensor] = []  # matrices
        self.undecayed: list[Tensor] = []  # biases and norms, which weight decay leaves alone
        self._parameters: list[Tensor] = []
        self._pieces: list[Piece] = []
        for name, parameter in model.named_parameters():
            _own_memory(parameter)
            self._parameters.append(parameter)
            home = self.undecayed if parameter.ndim < 2 or name.endswith("bias") else self.decayed
            if name not in masks:
                home.append(parameter)
                continue
            pieces = [Piece.of(parameter, *piece) for piece in cut(masks[name])]
            self._pieces += pieces
            home += [piece.leaf for piece in pieces]

    @property
    def leaves(self) -> list[Tensor]:
        """Everything that the optimizer trains."""
        return self.decayed + self.undecayed

    def pull_gradients(self) -> None:
        """Move gradients from parameters to leaves; parameters with leaves are left without one."""
        for piece in self._pieces:
            piece.pull()
        for piece in self._pieces:
            piece.parameter.grad = None

    def push_values(self) -> None:
        """Put trained leaves into their parameters and forget all gradients."""
        for piece in self._pieces:
            piece.push()
            piece.leaf.grad = None
        for parameter in self._parameters:
            parameter.grad = None


def _own_memory(parameter: Any) -> None:
    """Give a parameter contiguous memory of its own: transformers lets it share that of the tensors it came from."""
    parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
