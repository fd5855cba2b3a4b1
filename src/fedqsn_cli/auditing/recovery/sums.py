"""What is added up while truth, public base and proxies are read side by side: for each target, attack by attack."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.auditing.kernels import compare_codes
from fedqsn_cli.auditing.opened_proxy import OpenedProxy
from fedqsn_cli.auditing.recovery.evidence import Codes
from fedqsn_cli.auditing.recovery.metrics import EXACT, AttackResult, ErrorSums, Flags
from fedqsn_cli.auditing.rows import as_float32, model_rows
from fedqsn_cli.kernels.floats import writable
from fedqsn_cli.kernels.jit import as_bits
from fedqsn_cli.models.public_base import PublicBase
from fedqsn_cli.models.tensor_task import TensorTask

Array = NDArray[Any]
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
    """Rows of one tensor.

    Args:
        stored: the truth as it is stored. public: the public base; None where it has no such tensor.
    """

    task: TensorTask
    first: int
    stored: Array
    public: PublicBase | None

    @property
    def count(self) -> int:
        """How many."""
        return int(self.stored.shape[1 if self.task.layout.transposed else 0])

    @cached_property
    def w(self) -> Floats:
        """The truth, [rows, cols] fp32."""
        return np.asarray(as_float32(self.task, self.stored))

    @cached_property
    def base(self) -> Floats | None:
        """The public base, [rows, cols] fp32."""
        return None if self.public is None else model_rows(self.public, self.task, self.first, self.count)

    @property
    def everything(self) -> Flags:
        """Flags of all elements."""
        return np.ones(len(self.w), np.bool_), np.ones((1, self.w.shape[1]), np.float32)

    def add(self, sums: ErrorSums, guess: Floats, shown: Flags, **how: Any) -> None:
        """Add a guess of them; arguments are those of `ErrorSums.add`."""
        sums.add(self.w, guess, shown, base=self.base, **how)

    def add_codes(self, whole: ErrorSums, sums: ErrorSums, codes: Codes, shown: Flags) -> None:
        """Add codes as a guess of them where there is no base, and count, w and w² of all of them."""
        bits, kind = as_bits(self.stored, self.task.tensor.dtype)
        compare_codes(
            *(writable(bits).reshape(self.stored.shape), kind, *codes, *shown, EXACT, whole.values, sums.values)
        )

    def add_base(self, sums: ErrorSums, shown: Flags) -> None:
        """Add the public base as the guess, if it has the tensor."""
        if self.base is not None:
            self.add(sums, self.base, shown, tolerance=0.0)
