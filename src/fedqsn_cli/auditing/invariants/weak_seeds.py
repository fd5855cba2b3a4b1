"""The first numbers that `torch.manual_seed(s)` leads to, for all seeds at once: masks that anybody can draw again.

torch draws on a CPU from MT19937 (Matsumoto and Nishimura, 1998), as numba's `random` does: randperm(n) swaps element i
with element i + (number modulo n - i); rand(n) takes the low 24 bits of a number over 2^24.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.kernels.jit import kernel
from fedqsn_cli.kernels.threads import run_ranges

SEEDS = 65536
_AT_ONCE = 1024  # seeds; between them a signal is heeded


def longest_runs(hidden: NDArray[np.bool_], seeds: int = SEEDS) -> NDArray[np.int64]:
    """For each set of hidden units, the longest run that any seed explains.

    Args:
        hidden: [sets, n] flags.
        seeds: 0 to seeds - 1 are tried.

    Returns:
        [sets] the largest number of units, counted from one end of randperm(n) or from one end of the order of rand(n),
        that are all hidden.
    """
    sets = len(hidden)
    runs = np.zeros((seeds, sets), np.int64)
    flags = np.ascontiguousarray(hidden)
    for begin in range(0, seeds, _AT_ONCE):
        part = runs[begin : begin + _AT_ONCE]
        run_ranges(len(part), 256, partial(_try, begin, flags, part))
    return np.asarray(runs.max(axis=0))


def _try(begin: int, flags: NDArray[np.bool_], runs: NDArray[np.int64], first: int, stop: int) -> None:
    _runs(begin + first, flags, runs[first:stop])


@kernel
def _permute(numbers: Any, order: Any) -> None:
    """order = randperm(n), from n numbers."""
    n = order.size
    for i in range(n):
        order[i] = i
    for i in range(n - 1):
        j = i + np.uint32(numbers[i] % np.uint32(n - i))
        kept = order[i]
        order[i] = order[j]
        order[j] = kept


@kernel
def _longest(flags: Any, order: Any, numbers: Any) -> Any:
    """The longest run of flagged units, from either end of randperm(n) or of the order of rand(n)."""
    n = flags.size
    ahead = 0
    while ahead < n and flags[order[ahead]]:
        ahead += 1
    behind = 0
    while behind < n and flags[order[n - 1 - behind]]:
        behind += 1
    low, high = np.int64(1 << 24), np.int64(-1)
    for i in range(n):
        if not flags[i]:
            rank = np.int64(numbers[i] & np.uint32(0xFFFFFF))
            low, high = min(low, rank), max(high, rank)
    below = above = np.int64(0)
    for i in range(n):
        rank = np.int64(numbers[i] & np.uint32(0xFFFFFF))
        below += rank < low
        above += rank > high
    return max(max(ahead, behind), max(below, above))


@kernel
def _runs(first: int, hidden: Any, out: Any) -> None:
    """The longest run of each set for successive seeds."""
    n = hidden.shape[1]
    numbers, order = np.empty(n, np.uint32), np.empty(n, np.int64)
    for start in range(out.shape[0]):
        random.seed(first + start)
        for i in range(n):
            numbers[i] = random.getrandbits(32)
        _permute(numbers, order)
        for index in range(hidden.shape[0]):
            out[start, index] = _longest(hidden[index], order, numbers)
