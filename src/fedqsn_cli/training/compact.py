"""The visible part of a model's parameters, as the small tensors (leaves) that the optimizer trains in their place.

    parameter.grad ──gather──▶ leaf.grad ──clip, AdamW──▶ leaf ──scatter──▶ parameter

Hidden units have no gradient, no weight decay and no optimizer state: no leaf holds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fedqsn_cli.planning.tensor_plan import UnitAxis


class Trainable(Protocol):
    """What an optimizer trains of a model, and how its values get into the model."""

    decayed: list[Tensor]
    undecayed: list[Tensor]

    @property
    def leaves(self) -> list[Tensor]:
        """Everything that the optimizer trains: matrices, which weight decay applies to, then biases and norms."""

    def gather_gradients(self) -> None:
        """Set the gradients of the leaves from those of the model; called after the backward passes of a step."""

    def scatter_values(self) -> None:
        """Write the values of the leaves into the model and drop all gradients; called after the optimizer's step."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The visible part of a parameter, or of one slice of it.

    Args:
        parameter: the whole parameter, contiguous.
        part: indices of the leading dimensions, which select the slice; () for the whole.
        axis: what is visible of the slice, seen as [rows, cols]: rows, columns or single elements.
        index: which of them are visible, int64 [visible].
        leaf: their values, [visible, cols], [rows, visible] or [visible]; what the optimizer trains.
    """

    parameter: Tensor
    part: tuple[int, ...]
    axis: UnitAxis
    index: Tensor
    leaf: Tensor

    @classmethod
    def of(cls, parameter: Tensor, part: tuple[int, ...], axis: UnitAxis, index: Tensor) -> Piece:
        """A piece whose leaf has the parameter's values."""
        index = index.to(parameter.device)
        return cls(parameter, part, axis, index, _select(parameter.detach(), part, axis, index))

    def gather(self) -> None:
        """Set the leaf's gradient from the parameter's."""
        gradient = self.parameter.grad
        self.leaf.grad = None if gradient is None else _select(gradient, self.part, self.axis, self.index)

    def scatter(self) -> None:
        """Write the leaf's values into the parameter."""
        view = _matrix(self.parameter.detach(), self.part, self.axis)
        view.index_copy_(_dimension(self.axis), self.index, self.leaf.detach())


def _matrix(tensor: Tensor, part: tuple[int, ...], axis: UnitAxis) -> Tensor:
    """A slice of a tensor as [rows, cols], or as [elements]."""
    piece = tensor[part]
    return piece.view(-1) if axis == "element" else piece.view(-1, piece.shape[-1])


def _select(tensor: Tensor, part: tuple[int, ...], axis: UnitAxis, index: Tensor) -> Tensor:
    return _matrix(tensor.contiguous(), part, axis).index_select(_dimension(axis), index)


def _dimension(axis: UnitAxis) -> int:
    return 1 if axis == "column" else 0


def split(mask: Tensor, part: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], UnitAxis, Tensor]]:
    """Split a bool mask into whole rows or whole columns, slice by slice, and into single elements where it must be.

    Yields:
        For each piece, `part`, `axis` and `index` of a `Piece`.
    """
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
            yield from split(piece, (*part, number))


class VisibleParameters:
    """What the optimizer trains of a model: parameters without hidden units themselves, and leaves of the others."""

    def __init__(self, model: Any, masks: Mapping[str, Tensor]) -> None:
        """Gather the leaves.

        Args:
            model: its parameters become contiguous tensors with memory of their own.
            masks: bool, in the shape of the parameter, True where visible; for each parameter with hidden units.
        """
        self.decayed: list[Tensor] = []  # matrices
        self.undecayed: list[Tensor] = []  # biases and norms, which weight decay leaves alone
        self._parameters: list[Tensor] = []
        self._pieces: list[Piece] = []
        for name, parameter in model.named_parameters():
            _own_memory(parameter)
            self._parameters.append(parameter)
            group = self.undecayed if parameter.ndim < 2 or name.endswith("bias") else self.decayed
            if name not in masks:
                group.append(parameter)
                continue
            pieces = [Piece.of(parameter, *piece) for piece in split(masks[name])]
            self._pieces += pieces
            group += [piece.leaf for piece in pieces]

    @property
    def leaves(self) -> list[Tensor]:
        """Everything that the optimizer trains."""
        return self.decayed + self.undecayed

    def gather_gradients(self) -> None:
        """Move gradients from parameters to their leaves; parameters with leaves keep none."""
        for piece in self._pieces:
            piece.gather()
        for piece in self._pieces:  # only now: several pieces may belong to one parameter
            piece.parameter.grad = None

    def scatter_values(self) -> None:
        """Write trained leaves into their parameters and drop all gradients."""
        for piece in self._pieces:
            piece.scatter()
            piece.leaf.grad = None
        for parameter in self._parameters:
            parameter.grad = None


def _own_memory(parameter: Any) -> None:
    """Give a parameter contiguous memory of its own: transformers lets it share that of the tensors it came from."""
    parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
