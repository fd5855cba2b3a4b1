"""The first numbers that `torch.manual_seed(s)` leads to, for all seeds at once: masks that anybody can draw again.

torch draws on a CPU from MT19937 (Matsumoto and Nishimura, 1998): randperm(n) swaps element i with element
i + (number modulo n - i); rand(n) takes the low 24 bits of a number over 2^24.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.kernels.jit import kernel
from fedqsn_cli.kernels.threads import run_ranges

SEEDS = 65536
_AT_ONCE = 1024  # seeds; between them a signal is heeded

_WORDS, _SHIFT = 624, 397
_LANES = 16  # generators side by side, in one register of the processor


def longest_runs(hidden: NDArray[np.bool_], seeds: int = SEEDS) -> NDArray[np.int64]:
    """For each set of hidden units, the longest run that any seed explains.

    Args:
        hidden: [sets, n] flags.
        seeds: 0 to seeds - 1 are tried; a multiple of 16.

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
def _start(first: int, words: Any) -> None:
    """Seed one generator a lane, with first, first + 1, ..."""
    for lane in range(_LANES):
        words[0, lane] = np.uint32(first + lane)
    for i in range(1, _WORDS):
        for lane in range(_LANES):
            x = np.uint32(words[i - 1, lane] ^ (words[i - 1, lane] >> np.uint32(30)))
            words[i, lane] = np.uint32(np.uint32(1812433253) * x + np.uint32(i))


@kernel
def _draw(words: Any, numbers: Any) -> None:
    """numbers[i, lane] = number i of each generator."""
    for i in range(numbers.shape[0]):
        at, after, far = i % _WORDS, (i + 1) % _WORDS, (i + _SHIFT) % _WORDS
        for lane in range(_LANES):
            y = np.uint32((words[at, lane] & np.uint32(0x80000000)) | (words[after, lane] & np.uint32(0x7FFFFFFF)))
            odd = np.uint32((y & np.uint32(1)) * np.uint32(0x9908B0DF))
            x = np.uint32(words[far, lane] ^ (y >> np.uint32(1)) ^ odd)
            words[at, lane] = x
            x ^= x >> np.uint32(11)
            x ^= np.uint32((x << np.uint32(7)) & np.uint32(0x9D2C5680))
            x ^= np.uint32((x << np.uint32(15)) & np.uint32(0xEFC60000))
            numbers[i, lane] = np.uint32(x ^ (x >> np.uint32(18)))


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
    """The longest run of each set for successive seeds, a multiple of 16 of them."""
    n = hidden.shape[1]
    words, numbers = np.empty((_WORDS, _LANES), np.uint32), np.empty((n, _LANES), np.uint32)
    own, order = np.empty(n, np.uint32), np.empty(n, np.int64)
    for start in range(0, out.shape[0], _LANES):
        _start(first + start, words)
        _draw(words, numbers)
        for lane in range(_LANES):
            for i in range(n):
                own[i] = numbers[i, lane]
            _permute(own, order)
            for index in range(hidden.shape[0]):
                out[start + lane, index] = _longest(hidden[index], order, own)
