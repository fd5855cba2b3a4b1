"""What proxies say about rows of a tensor: one by one, and put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.auditing import kernels
from fedqsn_cli.auditing.opened_proxy import OpenedProxy
from fedqsn_cli.auditing.recovery.intervals import certain_values, intervals, once_rounded
from fedqsn_cli.auditing.rows import shown_flags
from fedqsn_cli.auditing.stored_rows import StoredRows
from fedqsn_cli.models.tensor_task import TensorTask

Array = NDArray[Any]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Reading:
    """What one proxy says about rows of a tensor, [rows, cols] each.

    Args:
        stored: as the proxy has them. factor: what the visible part of the tensor was multiplied by.
        row_flags, flags: what is shown: bool [rows], and fp32 [1, cols] or [rows, cols]; an element needs both.
    """

    proxy: OpenedProxy
    task: TensorTask
    stored: StoredRows
    factor: np.float32
    row_flags: Array
    flags: Floats

    @classmethod
    def of(cls, proxy: OpenedProxy, task: TensorTask, first: int, rows: int) -> Reading:
        """Read rows of a tensor. Raises FormatError."""
        stored = proxy.stored(task.name, task.layout, first, rows)
        return cls(proxy, task, stored, proxy.factor(task.name), *shown_flags(proxy, task, first, rows))

    @cached_property
    def sent(self) -> Floats:
        """As a client computes with them."""
        return self.stored.values()

    @cached_property
    def values(self) -> Floats:
        """Descaled."""
        return self.sent / self.factor

    @property
    def is_certain(self) -> bool:
        """Was every value rounded once only?"""
        return once_rounded(self.proxy, self.task)

    @cached_property
    def certain(self) -> Floats:
        """The values, NaN where rounding makes them uncertain."""
        return certain_values(self.proxy, self.task, self.sent, self.values)

    @cached_property
    def intervals(self) -> tuple[Floats, Floats]:
        """Where each weight is, by its rounded value: (low, high)."""
        return intervals(self.proxy, self.task, self.stored, self.sent)


@dataclass(slots=True)
class Evidence:
    """What several proxies say about the same rows, [rows, cols] each; NaN and infinity where they say nothing.

    Args:
        first: the first value that was shown. total, count: sum and number of shown values.
        low, high: ends of the interval that all rounded values leave.
        edge: the least scale that an element seemed to attain, with its sign; NaN where it never did.
        block: elements that share a scale, in C order; 1 where units share none.
    """

    first: Floats
    total: Floats
    count: Floats
    low: Floats
    high: Floats
    edge: Floats
    block: int

    @classmethod
    def none(cls, shape: tuple[int, int], block: int = 1) -> Evidence:
        """Nothing was shown yet."""
        first, total, count = (np.zeros(shape, np.float32) for _ in range(3))
        low, high, edge = (np.full(shape, value, np.float32) for value in (-np.inf, np.inf, np.nan))
        return cls(first, total, count, low, high, edge, block)

    def add(self, reading: Reading) -> None:
        """One more proxy."""
        kernels.add_reading(
            *(reading.values, reading.certain, *reading.intervals, reading.row_flags, reading.flags),
            *(self.first, self.total, self.count, self.low, self.high, self.edge),
        )

    @property
    def mean(self) -> Floats:
        """Mean of what was shown."""
        return np.asarray(self.total / np.maximum(self.count, np.float32(1)), np.float32)

    def clamped(self, guess: Floats) -> Floats:
        """A guess moved into the intervals; where intervals exclude each other, the mean of what was shown."""
        out = np.empty_like(self.first)
        arrays = (np.ascontiguousarray(guess), self.low, self.high, self.total, self.count, out)
        kernels.clamp(*(each.reshape(-1) for each in arrays))
        return out


def collect(proxies: Sequence[OpenedProxy], task: TensorTask, first: int, rows: int) -> Evidence:
    """What proxies say together about rows of a tensor."""
    evidence = Evidence.none((rows, task.layout.view[2]))
    for proxy in proxies:
        evidence.add(Reading.of(proxy, task, first, rows))
    return evidence
