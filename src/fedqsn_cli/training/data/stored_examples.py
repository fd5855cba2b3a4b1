"""Encoded examples, kept as they came: in memory while there are few, else in a file, and read one at a time.

An example is a line of JSON, `[feature, target]`, about five bytes a token. The file has no name and mode 0600, and it
is gone when the process ends, however that happens.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any, TypeVar, overload

T = TypeVar("T")

IN_MEMORY = 4 << 20
"""Bytes of examples that stay in memory."""


class StoredExamples:
    """Examples that are added once, and read as often as needed."""

    def __init__(self, folder: Path | None, in_memory: int = IN_MEMORY) -> None:
        """Nothing is written yet.

        Args:
            folder: where the file goes; None for the system's folder of temporary files.
            in_memory: bytes of examples that stay in memory.
        """
        where = None if folder is None else str(folder)
        self._file = SpooledTemporaryFile(max_size=in_memory, dir=where)  # noqa: SIM115 - lives as long as this object
        self._starts = array("Q", [0])
        self._lengths = array("I")

    def __len__(self) -> int:
        return len(self._starts) - 1

    def add(self, feature: dict[str, list[int]], target: Any, length: int) -> None:
        """Append an example of so many tokens. Raises OSError: the disk is full."""
        line = json.dumps([feature, target], separators=(",", ":")).encode()
        self._file.seek(self._starts[-1])
        self._file.write(line)
        self._starts.append(self._starts[-1] + len(line))
        self._lengths.append(length)

    def read(self, row: int) -> tuple[dict[str, list[int]], Any]:
        """Feature and target of an example."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        start = self._starts[row]
        self._file.seek(start)
        feature, target = json.loads(self._file.read(self._starts[row + 1] - start))
        return feature, target

    @property
    def features(self) -> Measured:
        """The features of all examples."""
        return Measured(self._lengths, lambda row: self.read(row)[0])

    @property
    def targets(self) -> Computed[Any]:
        """The targets of all examples."""
        return Computed(len(self), lambda row: self.read(row)[1])


class Computed(Sequence[T]):
    """A sequence whose items are computed when they are asked for."""

    def __init__(self, length: int, item: Callable[[int], T]) -> None:
        self._length, self._item = length, item

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        if isinstance(place, slice):
            return [self._item(one) for one in range(*place.indices(self._length))]
        if not -self._length <= place < self._length:
            raise IndexError(place)
        return self._item(place % self._length)

    def __iter__(self) -> Iterator[T]:
        return map(self._item, range(self._length))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


class Measured(Computed[dict[str, list[int]]]):
    """Features whose lengths in tokens are known without computing them."""

    def __init__(self, lengths: Sequence[int], item: Callable[[int], dict[str, list[int]]]) -> None:
        super().__init__(len(lengths), item)
        self.lengths = lengths
