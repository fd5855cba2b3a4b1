"""What proxies say about rows of a tensor: one by one, and put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.auditing import kernels
from fedqsn_cli.auditing.opened_proxy import OpenedProxy
from fedqsn_cli.auditing.recovery.intervals import certain_values, intervals, once_rounded
from fedqsn_cli.auditing.rows import shown_flags
from fedqsn_cli.models.tensor_task import TensorTask
from fedqsn_cli.quantization.codebooks import FORMATS

Array = NDArray[Any]
Floats = NDArray[np.float32]


class Codes(NamedTuple):
    """Codes of rows and how to read them; fields are arguments of `kernels.compare_codes`."""

    packed: NDArray[np.uint8]
    skipped: int
    scales: Floats
    block: int
    pairs: NDArray[np.uint64]
    divisor: np.float32


@cache
def pairs_of_levels(format: str) -> NDArray[np.uint64]:
    """The two levels of each byte of codes, fp32, as 64 bits: [256]."""
    levels, byte = np.array(FORMATS[format].values, np.float32), np.arange(256)
    return np.stack([levels[byte >> 4], levels[byte & 15]], axis=1).view(np.uint64).reshape(-1)


@dataclass(frozen=True)
class Reading:
    """What one proxy says about some rows of a tensor, [rows, cols] each.

    Args:
        factor: what the visible part of the tensor was multiplied by.
        row_flags, flags: what is shown: bool [rows], and fp32 [1, cols] or [rows, cols]; an element needs both.
    """

    proxy: OpenedProxy
    task: TensorTask
    first: int
    rows: int
    factor: np.float32
    row_flags: Array
    flags: Floats

    @classmethod
    def of(cls, proxy: OpenedProxy, task: TensorTask, first: int, rows: int) -> Reading:
        """Rows of a tensor, which are read when they are needed: that raises FormatError."""
        return cls(proxy, task, first, rows, proxy.factor(task.name), *shown_flags(proxy, task, first, rows))

    @cached_property
    def sent(self) -> Floats:
        """As a client computes with them."""
        return self.proxy.values(self.task.name, self.task.layout, self.first, self.rows)

    @property
    def codes(self) -> Codes | None:
        """The 4-bit codes, where they are in the order of the truth and no row begins within a byte."""
        task, name = self.task, self.task.name
        packing = self.proxy.packing(name, task.layout)
        if packing is None or packing.kind != "pack4" or task.layout.transposed or task.layout.view[2] % 2:
            return None
        codes, scales, skipped = self.proxy.coded(name, packing, self.first, self.rows)
        return Codes(codes, skipped, scales, packing.block, pairs_of_levels(packing.format), self.factor)

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
        return intervals(self.proxy, self.task, self.first, self.sent)


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
