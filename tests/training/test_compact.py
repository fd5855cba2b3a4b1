"""The visible part of parameters: split into rows, columns or elements, and back without touching anything else."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedqsn_cli.training.compact import Piece, VisibleParameters, split


def bools(*sizes: int) -> Tensor:
    return torch.rand(sizes) < 0.5


def axes(mask: Tensor) -> list[str]:
    return [axis for _, axis, _ in split(mask)]


def test_rows_columns_and_elements_are_distinguished() -> None:
    torch.manual_seed(1)
    assert axes(bools(7, 1).expand(7, 5)) == ["row"]
    assert axes(bools(1, 5).expand(7, 5)) == ["column"]
    assert axes(bools(7, 5)) == ["element"]
    assert axes(bools(7)) == ["element"]


def test_stacks_of_rows_stay_whole_and_stacks_of_columns_are_split_by_slice() -> None:
    torch.manual_seed(1)
    assert axes(bools(3, 7, 1).expand(3, 7, 5)) == ["row"]
    assert axes(bools(3, 1, 5).expand(3, 7, 5)) == ["column"] * 3
    assert [part for part, _, _ in split(bools(2, 7, 5))] == [(0,), (1,)]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple),
    spread=st.integers(0, 3),
    seed=st.integers(0, 10_000),
)
def test_what_is_gathered_and_put_back_is_exactly_what_the_mask_shows(
    shape: tuple[int, ...], spread: int, seed: int
) -> None:
    torch.manual_seed(seed)
    sizes = [1 if spread == place else size for place, size in enumerate(shape)]
    mask = bools(*sizes).expand(shape)
    before = torch.randn(shape)
    parameter = before.clone()
    pieces = [Piece.of(parameter, *piece) for piece in split(mask)]
    assert sum(piece.leaf.numel() for piece in pieces) == int(mask.sum())
    for piece in pieces:
        piece.release()
        piece.fetch()
        piece.leaf.add_(1)
        piece.scatter()
    torch.testing.assert_close(parameter, torch.where(mask, before + 1, before), rtol=0, atol=0)


def test_gradients_move_to_the_leaves_and_nothing_stays_behind() -> None:
    layer = nn.Linear(4, 3)
    mask = torch.tensor([True, False, True])
    visible = VisibleParameters(layer, {"weight": mask[:, None].expand(3, 4), "bias": mask})
    layer(torch.ones(2, 4)).sum().backward()
    assert [leaf.grad.shape for leaf in visible.leaves if leaf.grad is not None] == [(2, 4), (2,)]
    assert layer.weight.grad is None
    visible.drop_gradients()
    assert all(leaf.grad is None for leaf in visible.leaves)


def test_biases_and_norms_have_no_decay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    visible = VisibleParameters(model, {})
    assert [tensor.ndim for tensor in visible.decayed] == [2]
    assert [tensor.ndim for tensor in visible.undecayed] == [1, 1, 1]
