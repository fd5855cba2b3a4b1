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

from fedqsn_cli.kernels.jit import kernel, view_kernel
from fedqsn_cli.kernels.threads import run_ranges

Doubles = NDArray[np.float64]

MEDIAN, TRIMMED, NEAREST = 0, 1, 2
KINDS = {"median": MEDIAN, "trimmed-mean": TRIMMED, "bulyan": NEAREST}
GRAIN = 1 << 12  # minimum number of weights for a thread
PIECE = 256  # weights that are put in order together: their values of ten clients fit in the first cache


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
    """Rows start .. stop, piece by piece: the same steps for all weights of a piece, so that they vectorise."""
    clients, cols = values.shape[0], values.shape[2]
    room, counts = np.empty((clients, PIECE)), np.empty(PIECE, np.int64)
    for row in range(start, stop):
        for at in range(0, cols, PIECE):
            size, unit = min(PIECE, cols - at), row * across + at * along
            counts[:size] = 0
            for client in range(clients):
                shown = seen[client, unit : unit + size] if along else seen[client, unit : unit + 1]
                _take(values[client, row, at : at + size], shown, room[client, :size], counts[:size])
            _sort(room, size)
            result = out[row, at : at + size]
            if kind == MEDIAN:
                _median(room, counts, drop, result)
            elif kind == TRIMMED:
                _trimmed_mean(room, counts, drop, result)
            else:
                _mean_of_nearest(room, counts, drop, result)


@view_kernel
def _take(values: Any, shown: Any, out: Any, counts: Any) -> None:
    """Values of a client, and infinity where it did not see the unit; `shown` has one flag for each, or one for all."""
    if shown.size == 1:
        out[:] = np.inf
        if shown[0] != 0.0:
            for i in range(out.size):
                out[i] = values[i]
                counts[i] += 1
        return
    for i in range(out.size):
        out[i] = values[i] if shown[i] != 0.0 else np.inf
        counts[i] += int(shown[i] != 0.0)


@view_kernel
def _sort(room: Any, size: int) -> None:
    """Put every column in order by Batcher's network (Knuth, The Art of Computer Programming 3, 5.2.2, algorithm M)."""
    count = room.shape[0]
    half = 1
    while 2 * half < count:
        half *= 2
    p = half
    while p > 0 and count > 1:
        q, r, d = half, 0, p
        while d > 0:
            for i in range(count - d):
                if i & p == r:
                    _exchange(room[i, :size], room[i + d, :size])
            d, q, r = q - p, q // 2, p
        p //= 2


@view_kernel
def _exchange(lower: Any, upper: Any) -> None:
    for i in range(lower.size):
        x, y = lower[i], upper[i]
        lower[i] = x if x < y else y
        upper[i] = y if x < y else x


@view_kernel
def _median(room: Any, counts: Any, drop: int, out: Any) -> None:
    """The middle of each column's values, which are in order; 0 where `drop` at both ends are all of them."""
    for i in range(out.size):
        count = counts[i]
        middle = 0.5 * room[(count - 1) // 2, i] + 0.5 * room[count // 2, i] if count > 0 else 0.0
        out[i] = middle if count > 2 * drop else 0.0


@view_kernel
def _trimmed_mean(room: Any, counts: Any, drop: int, out: Any) -> None:
    """The same for the mean without `drop` at both ends."""
    out[:] = 0.0
    for client in range(drop, room.shape[0] - drop):
        _add_where(room[client, : out.size], counts, client + drop, out)
    for i in range(out.size):
        out[i] = out[i] / (counts[i] - 2 * drop) if counts[i] > 2 * drop else 0.0


@view_kernel
def _add_where(values: Any, counts: Any, least: int, out: Any) -> None:
    """Add values of columns that have more than `least`."""
    for i in range(out.size):
        out[i] += values[i] if counts[i] > least else 0.0


@view_kernel
def _mean_of_nearest(room: Any, counts: Any, drop: int, out: Any) -> None:
    """The same for the mean without the 2 `drop` values furthest from the median; of two as far the larger goes."""
    for col in range(out.size):
        first, last = 0, counts[col]
        if last <= 2 * drop:
            out[col] = 0.0
            continue
        middle = 0.5 * room[(last - 1) // 2, col] + 0.5 * room[last // 2, col]
        for _ in range(2 * drop):
            larger_goes = room[last - 1, col] - middle >= middle - room[first, col]
            last -= int(larger_goes)
            first += 1 - int(larger_goes)
        total = 0.0
        for i in range(first, last):
            total += room[i, col]
        out[col] = total / (last - first)
