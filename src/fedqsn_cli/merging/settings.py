"""The options of a merge, and which of them go together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedqsn_cli.errors import InputError
from fedqsn_cli.merging.streaming import Normalize


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides how models and updates become one model; see `merge` for each."""

    normalize: Normalize
    server_lr: float | Literal["auto"]
    allow_worse: bool
    control: str | Path | None
    control_weight: float
    restore: str | None
    public_base: str | None
    blend: float | Literal["auto"]
    eval_data: str | Path | None
    report: str | Path | None

    @property
    def searches(self) -> bool:
        """Is there a number to look for?"""
        return "auto" in {self.server_lr, self.blend}

    def check(self, updates: Sequence[object], ledger: object, max_update_norm: float) -> None:
        """Refuse what does not go together. Raises InputError."""
        _number_or_auto(self.server_lr, "--server-lr")
        _number_or_auto(self.blend, "--blend")
        if self.restore is not None:
            self._check_restore(updates)
        else:
            self._check_merge(updates, ledger, max_update_norm)
        self._check_search()

    def _check_restore(self, updates: Sequence[object]) -> None:
        if updates:
            raise InputError("a restore takes no updates", where="--restore", hint="merge them first")
        if self.server_lr == "auto":
            raise InputError("a restore takes no step", where="--server-lr", hint="did you mean --blend auto?")
        if self.control is not None:
            raise InputError("a restore takes no updates, nor a control", where="--control", hint="merge them first")

    def _check_merge(self, updates: Sequence[object], ledger: object, max_update_norm: float) -> None:
        rate = 1.0 if self.server_lr == "auto" else self.server_lr
        if not updates:
            raise InputError("no update was given", hint="name the update directories, or end the job with --restore")
        if ledger is None:
            raise InputError("merging updates needs the ledger of their releases", where="--ledger")
        if self.normalize not in {"coverage", "clients"}:
            raise InputError(
                f"unknown normalization {self.normalize!r}", where="--normalize", hint="coverage or clients"
            )
        if not (math.isfinite(rate) and rate > 0):
            raise InputError(f"{rate} is not a learning rate", where="--server-lr", hint="a number above 0, or auto")
        if not max_update_norm > 0:
            raise InputError(f"{max_update_norm} is not a norm", where="--max-update-norm", hint="a number above 0")
        if self.blend != 1.0:
            raise InputError("only a restore blends", where="--blend", hint="use it with --restore")
        if self.public_base is not None:
            raise InputError("only a restore takes a public base", where="--public-base", hint="use it with --restore")
        if not 0 < self.control_weight <= 1:
            raise InputError(
                f"{self.control_weight} is not a weight", where="--control-weight", hint="a number above 0, up to 1"
            )
        if self.control is None and self.control_weight != 1.0:
            raise InputError("there is no control update", where="--control-weight", hint="give it with --control")

    def _check_search(self) -> None:
        option = "--blend auto" if self.restore is not None else "--server-lr auto"
        if self.searches and self.eval_data is None:
            raise InputError(f"{option} needs development data", where="--eval-data", hint="give a file of your own")
        for flag, given in (("--eval-data", self.eval_data), ("--report", self.report)):
            if given is not None and not self.searches:
                raise InputError("nothing is looked for", where=flag, hint=f"give it with {option}")
        if self.allow_worse and self.server_lr != "auto":
            raise InputError("a given step is taken anyway", where="--allow-worse", hint="use it with --server-lr auto")
        if self.report is not None and not Path(self.report).absolute().parent.is_dir():
            raise InputError("there is no such folder", where=Path(self.report).parent, hint="make it first")
        if self.report is not None and Path(self.report).is_dir():
            raise InputError("is a directory", where=self.report, hint="name a file")


def _number_or_auto(value: object, flag: str) -> None:
    if value != "auto" and not isinstance(value, (int, float)):
        raise InputError(f"{value!r} is neither a number nor auto", where=flag)
