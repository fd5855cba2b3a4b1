"""Masks that seeded generators draw, compared with what torch draws."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedqsn_cli.auditing.invariants.weak_seeds import longest_runs

SEEDS = 32


def leading(flags: Sequence[bool]) -> int:
    """How many flags are set before the first that is not."""
    return next((place for place, flag in enumerate(flags) if not flag), len(flags))


def expected(flags: NDArray[np.bool_]) -> int:
    """The longest run that a seed below SEEDS explains."""
    found = []
    for seed in range(SEEDS):
        permuted = torch.randperm(flags.size, generator=torch.Generator().manual_seed(seed))
        ordered = torch.rand(flags.size, generator=torch.Generator().manual_seed(seed)).argsort()
        for order in (flags[permuted.numpy()], flags[ordered.numpy()]):
            found += [leading(order.tolist()), leading(order[::-1].tolist())]
    return max(found)


@pytest.mark.parametrize("n", [31, 64, 227, 624, 1300])
def test_runs_are_those_that_torch_draws(n: int) -> None:
    rng = np.random.default_rng(n)
    hidden = rng.random((4, n)) < np.array([[0.3], [0.6], [0.9], [0.97]])
    assert longest_runs(hidden, SEEDS).tolist() == [expected(flags) for flags in hidden]


@pytest.mark.parametrize("seed", [0, 1, 65535])
def test_a_mask_of_any_seed_is_found_whole(seed: int) -> None:
    order = torch.randperm(100, generator=torch.Generator().manual_seed(seed)).numpy()
    hidden = np.zeros((1, 100), np.bool_)
    hidden[0, order[:40]] = True
    assert longest_runs(hidden).tolist() == [40]
