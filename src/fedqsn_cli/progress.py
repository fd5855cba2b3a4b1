"""How long tasks report their progress, whatever shows it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A receiver of progress. `console.Bar` shows it on a terminal; notebooks may pass their own."""

    def start(self, label: str, total: int | None, unit: str) -> None:
        """A new task begins: `total` units of `unit` ("bytes", "steps", "examples"), None if unknown."""

    def advance(self, amount: int, **figures: float) -> None:
        """`amount` more units are done; `figures` are the latest values worth showing (loss, tokens_per_s)."""

    def finish(self) -> None:
        """The task that was started last is done."""

    def note(self, text: str) -> None:
        """Something that happened and that people should know: one line, without a full stop."""


class Silent:
    """A receiver that shows nothing."""

    def __repr__(self) -> str:
        return "SILENT"

    def start(self, label: str, total: int | None, unit: str) -> None:
        """Ignore it."""

    def advance(self, amount: int, **figures: float) -> None:
        """Ignore it."""

    def finish(self) -> None:
        """Ignore it."""

    def note(self, text: str) -> None:
        """Ignore it."""


SILENT = Silent()
