"""The visible part of a model's parameters, as the small tensors (leaves) that the optimizer trains in their place.

    parameter.grad ──gather──▶ leaf.grad ──clip, optimizer──▶ leaf ──scatter──▶ parameter

Hidden units have no gradient, no weight decay and no optimizer state: no leaf holds them. A gradient moves to its leaf
as soon as the backward pass has computed it, and a leaf has memory for its values only while the optimizer changes
them: beside the model there are the gradients and the optimizer's state of what is visible, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

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

    def updating(self, leaves: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Within this block these leaves hold the model's values; what they hold when it ends is put into the model."""

    def drop_gradients(self) -> None:
        """Drop all gradients; called after the optimizer's step."""

    def takes_rows(self, parameter: Tensor) -> bool:
        """Whether the gradient of a parameter may be a sparse tensor, of the rows that take part."""


@dataclass(frozen=True, slots=True)
class TrainedPart:
    """The parameters of a model that have gradients, as `VisibleParameters` asks for them."""

    parameters: Mapping[str, nn.Parameter]

    @classmethod
    def of(cls, model: nn.Module) -> TrainedPart:
        """Those of a model of which a part is frozen."""
        return cls({name: value for name, value in model.named_parameters() if value.requires_grad})

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters, in the order of the model."""
        yield from self.parameters.items()


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

    @property
    def takes_rows(self) -> bool:
        """Whether the gradient may be sparse, of the rows of a matrix that take part. Sums in bf16 would differ."""
        return self.axis == "column" and self.parameter.ndim == 2 and self.parameter.dtype == torch.float32

    def gather(self) -> None:
        """Set the leaf's gradient from the parameter's, if that has one."""
        if self.parameter.grad is not None:
            self.leaf.grad = None
            self.accumulate()

    def accumulate(self) -> None:
        """Add the parameter's gradient to the leaf's."""
        gradient, before = self.parameter.grad, self.leaf.grad
        if gradient is None:
            return
        if gradient.is_sparse:
            rows, values = gradient._indices()[0], gradient._values()  # coalescing would add in another order
            total = torch.zeros(self.leaf.shape, device=gradient.device) if before is None else before
            self.leaf.grad = total.index_add_(0, rows, values.index_select(1, self.index))
        else:
            shown = _select(gradient, self.part, self.axis, self.index)
            self.leaf.grad = shown if before is None else before.add_(shown)

    def fetch(self) -> None:
        """Give the leaf memory, and in it the parameter's values."""
        self.leaf.untyped_storage().resize_(self.leaf.numel() * self.leaf.element_size())
        view = _matrix(self.parameter.detach(), self.part, self.axis)
        torch.index_select(view, _dimension(self.axis), self.index, out=self.leaf)

    def scatter(self) -> None:
        """Write the leaf's values into the parameter."""
        view = _matrix(self.parameter.detach(), self.part, self.axis)
        view.index_copy_(_dimension(self.axis), self.index, self.leaf.detach())

    def release(self) -> None:
        """Free the memory of the leaf's values; its shape and its gradient stay."""
        self.leaf.untyped_storage().resize_(0)


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
        self._pieces: dict[int, Piece] = {}  # by the identity of their leaf
        for name, parameter in model.named_parameters():
            _own_memory(parameter)
            self._parameters.append(parameter)
            group = self.undecayed if parameter.ndim < 2 or name.endswith("bias") else self.decayed
            group += self._split(parameter, masks[name]) if name in masks else [parameter]

    def _split(self, parameter: Tensor, mask: Tensor) -> list[Tensor]:
        """The leaves of a parameter, which get its gradients from now on."""
        pieces = [Piece.of(parameter, *piece) for piece in split(mask)]

        def take_gradient(parameter: Tensor) -> None:
            for piece in pieces:
                piece.accumulate()
            parameter.grad = None

        parameter.register_post_accumulate_grad_hook(take_gradient)  # type: ignore[no-untyped-call]
        for piece in pieces:
            piece.release()
            self._pieces[id(piece.leaf)] = piece
        return [piece.leaf for piece in pieces]

    @property
    def leaves(self) -> list[Tensor]:
        """Everything that the optimizer trains."""
        return self.decayed + self.undecayed

    def gather_gradients(self) -> None:
        """Move gradients that were set by other means than a backward pass from parameters to their leaves."""
        for piece in self._pieces.values():
            piece.gather()
        for piece in self._pieces.values():  # only now: several pieces may belong to one parameter
            piece.parameter.grad = None

    @contextmanager
    def updating(self, leaves: Sequence[Tensor]) -> Iterator[None]:
        """Within this block these leaves hold the parameters' values; when it ends, parameters hold theirs."""
        pieces = [self._pieces[id(leaf)] for leaf in leaves if id(leaf) in self._pieces]
        try:
            for piece in pieces:
                piece.fetch()
            yield
            for piece in pieces:
                piece.scatter()
        finally:
            for piece in pieces:
                piece.release()

    def drop_gradients(self) -> None:
        """Drop the gradients of leaves and parameters."""
        for tensor in (*self.leaves, *self._parameters):
            tensor.grad = None

    def takes_rows(self, parameter: Tensor) -> bool:
        """Whether all that is trained of a parameter are columns of it."""
        pieces = [piece for piece in self._pieces.values() if piece.parameter is parameter]
        return bool(pieces) and all(piece.takes_rows for piece in pieces)


def _own_memory(parameter: Any) -> None:
    """Give a parameter contiguous memory of its own: transformers lets it share that of the tensors it came from."""
    parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
