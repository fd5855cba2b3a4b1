"""Rules that put the values of one weight in order: coordinate-wise median, trimmed mean, and Bulyan's second half.

    median         the middle value, or the mean of the two in the middle     Yin et al. 2018, arXiv 1803.01498
    trimmed-mean   the mean without the f smallest and the f largest values   Yin et al. 2018
    bulyan         the mean of the m - 2 f values nearest to the median       El Mhamdi et al. 2018, arXiv 1802.07927

m clients saw the unit of the weight. All count the same, whatever number of examples they claim. With fewer than
2 f + 1 of them, f attackers could decide alone, and the unit stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.kernels.jit import kernel
from fedqsn_cli.kernels.threads import run_ranges

Doubles = NDArray[np.float64]

MEDIAN, TRIMMED, NEAREST = 0, 1, 2
KINDS = {"median": MEDIAN, "trimmed-mean": TRIMMED, "bulyan": NEAREST}
GRAIN = 1 << 12  # minimum number of weights for a thread


@dataclass(frozen=True, slots=True)
class OrderRule:
    """A rule, and f: how many attackers it withstands."""

    name: str
    byzantine: int

    @property
    def least(self) -> int:
        """How many clients must have seen a unit."""
        return 2 * self.byzantine + 1

    def apply(self, values: Doubles, seen: Doubles, strides: tuple[int, int], out: Doubles) -> None:
        """Write one value for each weight.

        Args:
            values: [clients, rows, cols]. seen, strides: see `chunk_stack`. out: [rows, cols]; 0 where a unit stays.
        """
        kind, drop, (across, along) = KINDS[self.name], self.byzantine, strides

        def work(start: int, stop: int) -> None:
            _combine(values, seen, across, along, kind, drop, start, stop, out)

        run_ranges(out.shape[0], max(1, GRAIN // max(out.shape[1], 1)), work)


@kernel
def _combine(
    values: Any, seen: Any, across: int, along: int, kind: int, drop: int, start: int, stop: int, out: Any
) -> None:
    """Rows start .. stop."""
    found = np.empty(values.shape[0])
    for row in range(start, stop):
        for col in range(out.shape[1]):
            unit, count = row * across + col * along, 0
            for client in range(values.shape[0]):
                if seen[client, unit] != 0.0:
                    found[count] = values[client, row, col]
                    count += 1
            out[row, col] = 0.0
            if count > 2 * drop:
                _sort(found[:count])
                out[row, col] = _value(found[:count], kind, drop)


@kernel
def _sort(x: Any) -> None:
    """Ascending: by insertion where that is faster."""
    if x.size > 32:
        x.sort()
        return
    for i in range(1, x.size):
        value, at = x[i], i
        while at > 0 and x[at - 1] > value:
            x[at] = x[at - 1]
            at -= 1
        x[at] = value


@kernel
def _value(x: Any, kind: int, drop: int) -> float:
    """What a rule makes of sorted values."""
    if kind == TRIMMED:
        return _mean(x[drop : x.size - drop])
    middle = 0.5 * x[(x.size - 1) // 2] + 0.5 * x[x.size // 2]
    if kind == MEDIAN:
        return float(middle)
    first, last = 0, x.size
    for _ in range(2 * drop):  # the value that is furthest from the median goes; of equal ones the larger
        if x[last - 1] - middle >= middle - x[first]:
            last -= 1
        else:
            first += 1
    return _mean(x[first:last])


@kernel
def _mean(x: Any) -> float:
    total = 0.0
    for i in range(x.size):
        total += x[i]
    return float(total / x.size)
