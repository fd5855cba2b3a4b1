"""The visible part of parameters: split into rows, columns or elements, and back without touching anything else."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedqsn_cli.training.steps.compact import Piece, VisibleParameters, split


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


def gradients_of_an_embedding(passes: int, *, sparse: bool) -> Tensor:
    """Those of its visible columns after some backward passes."""
    torch.manual_seed(2)
    model = nn.Embedding(50, 8, padding_idx=3, sparse=sparse)
    visible = VisibleParameters(model, {"weight": bools(1, 8).expand(50, 8)})
    assert visible.takes_rows(model.weight)
    for _ in range(passes):
        model(torch.randint(0, 20, (4, 16))).mul(torch.randn(4, 16, 8)).sum().backward()
    assert model.weight.grad is None
    (leaf,) = visible.leaves
    assert leaf.grad is not None
    return leaf.grad


def test_gradients_of_only_the_rows_that_take_part_are_those_of_all() -> None:
    once = [gradients_of_an_embedding(1, sparse=sparse) for sparse in (True, False)]
    assert torch.equal(*once)
    twice = [gradients_of_an_embedding(2, sparse=sparse) for sparse in (True, False)]
    torch.testing.assert_close(*twice, rtol=1e-5, atol=1e-5)


def test_only_columns_of_fp32_matrices_take_sparse_gradients() -> None:
    whole, rows, halves = nn.Embedding(6, 4), nn.Embedding(6, 4), nn.Embedding(6, 4, dtype=torch.bfloat16)
    shown, columns = torch.arange(6) % 2 == 0, (torch.arange(4) < 3).expand(6, 4)
    assert not VisibleParameters(whole, {}).takes_rows(whole.weight)
    assert not VisibleParameters(rows, {"weight": shown[:, None].expand(6, 4)}).takes_rows(rows.weight)
    assert not VisibleParameters(halves, {"weight": columns}).takes_rows(halves.weight)


def test_biases_and_norms_have_no_decay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    visible = VisibleParameters(model, {})
    assert [tensor.ndim for tensor in visible.decayed] == [2]
    assert [tensor.ndim for tensor in visible.undecayed] == [1, 1, 1]
