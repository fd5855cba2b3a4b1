"""What is added up while truth, public base and proxies are read side by side: for each target, attack by attack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.auditing.opened_proxy import OpenedProxy
from fedqsn_cli.auditing.recovery import attacks
from fedqsn_cli.auditing.recovery.metrics import AttackResult, ErrorSums
from fedqsn_cli.models.tensor_task import TensorTask

Floats = NDArray[np.float32]
Array = NDArray[Any]


@dataclass(frozen=True)
class Target:
    """One proxy, or several that are put together.

    Args:
        results: of each attack on each tensor.
    """

    scope: str
    proxies: Sequence[OpenedProxy]
    results: dict[str, dict[str, AttackResult]] = field(default_factory=dict)

    @property
    def reads_holes(self) -> bool:
        """Is what stands in the holes more than the public base?"""
        return len(self.proxies) == 1 and self.proxies[0].manifest.train == "all"


@dataclass
class TensorSums:
    """What is added up of one tensor of a target.

    Args:
        shown: sums of each attack over shown elements.
        moved: ||W' - B||² of each attack over the same elements.
        base_shown: sums over the same elements with the public base as the guess.
        as_filled, moved_as_filled: sums over all elements with what the proxy holds as the guess, holes included; and
            ||W' - B||² of that. Only of a proxy whose holes clients have trained.
    """

    target: Target
    shown: dict[str, ErrorSums]
    moved: dict[str, float]
    base_shown: ErrorSums = field(default_factory=ErrorSums)
    as_filled: ErrorSums = field(default_factory=ErrorSums)
    moved_as_filled: float = 0.0

    @classmethod
    def none(cls, target: Target, with_base: bool) -> TensorSums:
        """Nothing was read yet."""
        names = attacks.estimates(len(target.proxies), with_base)
        return cls(target, {name: ErrorSums() for name in names}, dict.fromkeys(names, 0.0))

    def add(self, other: TensorSums) -> None:
        """Add the sums of more rows."""
        for name, sums in other.shown.items():
            self.shown[name] = self.shown[name].plus(sums)
            self.moved[name] += other.moved[name]
        self.base_shown = self.base_shown.plus(other.base_shown)
        self.as_filled = self.as_filled.plus(other.as_filled)
        self.moved_as_filled += other.moved_as_filled


@dataclass
class RowSums:
    """What is added up of rows of a tensor: of each target, and of all elements, shown or not.

    Args:
        whole: with the truth for a guess: count, w and w². base: with the public base for a guess; None: it lacks them.
    """

    targets: list[TensorSums]
    whole: ErrorSums
    base: ErrorSums | None

    @classmethod
    def none(cls, targets: Sequence[Target], with_base: bool, base_has_it: bool) -> RowSums:
        """Nothing was read yet."""
        sums = [TensorSums.none(target, with_base) for target in targets]
        return cls(sums, ErrorSums(), ErrorSums() if base_has_it else None)

    def add(self, other: RowSums) -> None:
        """Add the sums of more rows."""
        for one, more in zip(self.targets, other.targets, strict=True):
            one.add(more)
        self.whole = self.whole.plus(other.whole)
        if self.base is not None and other.base is not None:
            self.base = self.base.plus(other.base)


@dataclass
class OrderedSums:
    """The sums of a tensor, added in the order of its rows, whichever order runs of them come in.

    Args:
        failure: what went wrong first, in that order.
    """

    sums: RowSums
    failure: Exception | None = None
    _next: int = 0
    _waiting: dict[int, tuple[int, RowSums | Exception]] = field(default_factory=dict)

    def put(self, first: int, rows: int, found: RowSums | Exception) -> None:
        """Take the sums of rows, or why there are none."""
        self._waiting[first] = rows, found
        while self._next in self._waiting:
            rows, found = self._waiting.pop(self._next)
            self._next += rows
            if isinstance(found, RowSums):
                self.sums.add(found)
            else:
                self.failure = self.failure or found


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one tensor: the truth and the public base (None where it has no such tensor), [rows, cols] fp32."""

    task: TensorTask
    first: int
    w: Floats
    base: Floats | None

    @property
    def everything(self) -> tuple[Array, Floats]:
        """Flags of all elements, as `ErrorSums.add` takes them."""
        return np.ones(len(self.w), np.bool_), np.ones((1, self.w.shape[1]), np.float32)
