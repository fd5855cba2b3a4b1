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


def longest_runs(hidden: NDArray[np.bool_], seeds: int = SEEDS) -> NDArray[np.int64]:
    """For each set of hidden units, the longest run that any seed explains.

    Args:
        hidden: [sets, n] flags.

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
def _start(seed: int, words: Any) -> None:
    words[0] = np.uint32(seed)
    for i in range(1, _WORDS):
        x = np.uint64(words[i - 1] ^ (words[i - 1] >> np.uint32(30)))
        words[i] = np.uint32((np.uint64(1812433253) * x + np.uint64(i)) & np.uint64(0xFFFFFFFF))


@kernel
def _next(words: Any, at: int) -> Any:
    """Number `at` (0, 1, ...) of the generator; numbers must be asked for in order."""
    i = at % _WORDS
    y = np.uint32((words[i] & np.uint32(0x80000000)) | (words[(i + 1) % _WORDS] & np.uint32(0x7FFFFFFF)))
    odd = np.uint32(0x9908B0DF) if y & np.uint32(1) else np.uint32(0)
    words[i] = words[(i + _SHIFT) % _WORDS] ^ (y >> np.uint32(1)) ^ odd
    x = words[i]
    x ^= x >> np.uint32(11)
    x ^= np.uint32((x << np.uint32(7)) & np.uint32(0x9D2C5680))
    x ^= np.uint32((x << np.uint32(15)) & np.uint32(0xEFC60000))
    return np.uint32(x ^ (x >> np.uint32(18)))


@kernel
def draw(seed: int, words: Any, order: Any, rank: Any) -> None:
    """order = randperm(n), rank = the 24 bits of rand(n), each from a generator that was just seeded."""
    n = order.size
    _start(seed, words)
    for i in range(n):
        order[i] = i
    for i in range(n - 1):
        j = i + np.int64(_next(words, i)) % (n - i)
        kept = order[i]
        order[i] = order[j]
        order[j] = kept
    _start(seed, words)
    for i in range(n):
        rank[i] = np.int64(_next(words, i) & np.uint32(0xFFFFFF))


@kernel
def _runs(first: int, hidden: Any, out: Any) -> None:
    n = hidden.shape[1]
    words, order, rank = np.empty(_WORDS, np.uint32), np.empty(n, np.int64), np.empty(n, np.int64)
    for number in range(out.shape[0]):
        draw(first + number, words, order, rank)
        for index in range(hidden.shape[0]):
            flags = hidden[index]
            ahead = 0
            while ahead < n and flags[order[ahead]]:
                ahead += 1
            behind = 0
            while behind < n and flags[order[n - 1 - behind]]:
                behind += 1
            low, high = np.int64(1 << 24), np.int64(-1)
            for i in range(n):
                if not flags[i]:
                    low, high = min(low, rank[i]), max(high, rank[i])
            below = above = 0
            for i in range(n):
                below += rank[i] < low
                above += rank[i] > high
            out[number, index] = max(max(ahead, behind), max(below, above))
