"""What happens to updates that are refused: the first one ends the merge, or all are noted and left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from fedqsn_cli.errors import InputError
from fedqsn_cli.merging.results import RefusedClient


class _InFolder(Protocol):
    @property
    def folder(self) -> Path:
        """Where the update is."""


Sent = TypeVar("Sent", bound=_InFolder)


@dataclass(frozen=True, slots=True)
class Refusals:
    """Updates that were refused so far.

    Args:
        skip: whether the merge goes on without them; otherwise the first one ends it.
    """

    skip: bool
    refused: list[RefusedClient]

    @contextmanager
    def noting(self, folder: str | Path, client: str | None = None) -> Iterator[None]:
        """Note an InputError about an update, unless it ends the merge. Raises that InputError."""
        try:
            yield
        except InputError as error:
            if not self.skip:
                raise
            self.refused.append(RefusedClient(str(folder), client, str(error)))

    def without(self, updates: Sequence[Sent]) -> list[Sent]:
        """The updates that were not refused."""
        refused = {item.folder for item in self.refused}
        return [update for update in updates if str(update.folder) not in refused]
