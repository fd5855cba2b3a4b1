"""What is added up while truth, public base and proxies are read side by side: for each target, attack by attack."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.auditing.opened_proxy import OpenedProxy
from fedqsn_cli.auditing.recovery.metrics import AttackResult, ErrorSums, Flags
from fedqsn_cli.auditing.stored_rows import StoredRows
from fedqsn_cli.models.tensor_task import TensorTask

Floats = NDArray[np.float32]

EVERYTHING, TRUTH, BASE = "everything", "truth", "base"


class Sums(defaultdict[tuple[str, str], ErrorSums]):
    """Sums by target, and by what was guessed for the elements that it shows.

    That is an attack, or BASE: the public base. Of EVERYTHING, shown or not, it is TRUTH, for count, w and w², or BASE.
    """

    def __init__(self) -> None:
        super().__init__(ErrorSums)


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
        """Is what is in the holes more than the public base?"""
        return len(self.proxies) == 1 and self.proxies[0].manifest.train == "all"


@dataclass
class OrderedSums:
    """The sums of a tensor, added in the order of its rows, whichever order runs of them come in.

    Args:
        failure: what went wrong first, in that order.
    """

    sums: Sums = field(default_factory=Sums)
    failure: Exception | None = None
    _next: int = 0
    _waiting: dict[int, tuple[int, Sums | Exception]] = field(default_factory=dict)

    def put(self, first: int, rows: int, found: Sums | Exception) -> None:
        """Take the sums of rows, or why there are none."""
        self._waiting[first] = rows, found
        while self._next in self._waiting:
            rows, found = self._waiting.pop(self._next)
            self._next += rows
            if isinstance(found, Exception):
                self.failure = self.failure or found
                continue
            for key, sums in found.items():
                self.sums[key] += sums


@dataclass(frozen=True)
class Rows:
    """Rows of one tensor: the truth, and the public base (None where it has no such tensor), [rows, cols] fp32."""

    task: TensorTask
    first: int
    truth: StoredRows
    base: Floats | None

    @property
    def everything(self) -> Flags:
        """Flags of all elements."""
        return np.ones(self.truth.rows, np.bool_), np.ones((1, self.truth.cols), np.float32)

    def add(self, sums: ErrorSums, guess: StoredRows, shown: Flags, **how: Any) -> None:
        """Add a guess of them; arguments are those of `ErrorSums.add`."""
        sums.add(self.truth, guess, shown, base=self.base, **how)

    def add_base(self, sums: ErrorSums, shown: Flags) -> None:
        """Add the public base as the guess, if it has the tensor."""
        if self.base is not None:
            self.add(sums, StoredRows.of(self.base), shown, tolerance=0.0)
