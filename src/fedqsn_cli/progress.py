"""How long work reports what it has done, without knowing who looks at it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receiver of progress. The terminal's bar implements it in `console`; notebooks may pass their own."""

    def start(self, label: str, total: int | None, unit: str) -> None:
        """A new piece of work begins: `total` units of `unit` ("bytes", "steps", "examples"), None if unknown."""

    def advance(self, amount: int, **figures: float) -> None:
        """`amount` more units are done; `figures` are the latest values worth showing (loss, examples_per_s)."""

    def finish(self) -> None:
        """The piece of work that was started last is done."""


class Silent:
    """The progress receiver that shows nothing."""

    def start(self, label: str, total: int | None, unit: str) -> None:
        return

    def advance(self, amount: int, **figures: float) -> None:
        return

    def finish(self) -> None:
        return


SILENT = Silent()
