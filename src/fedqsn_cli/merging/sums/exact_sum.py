"""Sums that depend neither on the order nor on the grouping of their terms.

A term t = c u, one product in double precision, is rounded once, to the nearest multiple of 2^-64, and cut in two:

    t = high 2^-16 + low 2^-64      |high| <= 2^48, |low| <= 2^47, both integers

Integers of 64 bits add up without rounding, here the halves of up to `MOST_TERMS` terms of less than `MOST_TERM`. A sum
is rounded to double precision once, when all terms are in it: so terms may be added up in parts, and the parts in any
order, and the result is the same to the last bit.

Adding 1.5 * 2^52 g to a number rounds it to a multiple of g, and leaves that multiple in the last bits of the sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.kernels.jit import kernel
from fedqsn_cli.kernels.threads import run_ranges

Doubles = NDArray[np.float64]
Longs = NDArray[np.int64]

MOST_TERMS = 30_000
MOST_TERM = 2.0**32

COARSE, FINE = 2.0**-16, 2.0**-64
SHIFT = 48  # one unit of `high` is 2^SHIFT units of `low`
GRAIN = 1 << 16

TO_COARSE, TO_FINE = 1.5 * 2.0**52 * COARSE, 1.5 * 2.0**52 * FINE
COARSE_BITS, FINE_BITS = (int(np.float64(x).view(np.int64)) for x in (TO_COARSE, TO_FINE))
_HALF = 1 << SHIFT - 1
_ROUNDINGS = 1e-9  # of norms and of coefficients in double precision, with room to spare


@dataclass(frozen=True, slots=True)
class Digits:
    """Sums of terms, [rows, cols], as two integers each."""

    high: Longs
    low: Longs

    def add(self, other: Digits) -> None:
        """Add sums that were settled."""
        np.add(self.high, other.high, out=self.high)
        np.add(self.low, other.low, out=self.low)

    def settle(self, out: Doubles) -> None:
        """Bring every `low` between -2^47 and 2^47, which changes no sum, and round the sums into `out`."""
        high, low, total = self.high.reshape(-1), self.low.reshape(-1), out.reshape(-1)
        run_ranges(total.size, GRAIN, lambda start, stop: _settle(high[start:stop], low[start:stop], total[start:stop]))

    def could_be_of(self, terms: int, sizes: float) -> bool:
        """Whether these are settled sums of so many terms.

        Args:
            sizes: what the absolute values of the terms add up to at most.
        """
        largest = max(abs(int(x)) for x in (self.high.min(initial=0), self.high.max(initial=0)))
        within = self.low.min(initial=0) >= -_HALF and self.low.max(initial=0) < _HALF
        most = sizes * (1 + _ROUNDINGS) / COARSE + 1
        return bool(within) and largest <= min(most, terms << SHIFT)


@kernel
def _settle(high: Any, low: Any, out: Any) -> None:
    for i in range(high.size):
        carry = (low[i] + _HALF) >> SHIFT
        high[i] += carry
        low[i] -= carry << SHIFT
        out[i] = np.float64(high[i]) * COARSE + np.float64(low[i]) * FINE


@kernel
def _digits(term: Any) -> Any:
    """A term as integers: units of `COARSE`, and what is left in units of `FINE`."""
    coarse = term + TO_COARSE
    fine = (term - (coarse - TO_COARSE)) + TO_FINE
    return np.float64(coarse).view(np.int64) - COARSE_BITS, np.float64(fine).view(np.int64) - FINE_BITS


@kernel
def add_run(values: Any, high: Any, low: Any, coefficient: float, sums: Any) -> None:
    """Add coefficient * values; `sums` gets the squares of the values."""
    for i in range(values.size):
        x = np.float64(values[i])
        sums[i] += x * x
        more, rest = _digits(coefficient * x)
        high[i] += more
        low[i] += rest


@kernel
def add_scattered(values: Any, high: Any, low: Any, index: Any, coefficient: float, sums: Any) -> None:
    """The same to the sums at `index`."""
    for i in range(values.size):
        x = np.float64(values[i])
        sums[i] += x * x
        more, rest = _digits(coefficient * x)
        high[index[i]] += more
        low[index[i]] += rest
