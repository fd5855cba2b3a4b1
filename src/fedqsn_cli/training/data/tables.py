"""The columns of training and evaluation files, a part of the rows at a time, and errors that name their rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from fedqsn_cli import strictjson
from fedqsn_cli.errors import DataError, FormatError
from fedqsn_cli.text import listed

COLUMNS = (
    *("text", "text_pair", "label", "tokens", "tags"),
    *("prompt", "completion", "messages", "conversations", "tools", "source", "target"),
)
"""Names of all columns that some task uses (`tasks`); others are not kept in memory."""

PART_ROWS, PART_BYTES = 2000, 16_000_000
"""The most rows, and about the most bytes, that are in memory together."""

_TYPE_NAMES: dict[type, str] = {
    type(None): "nothing",
    str: "text",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


@dataclass(frozen=True, slots=True)
class Unusable:
    """Stands for a value that cannot be used, in a column that may never be asked for."""

    reason: str


class Rows(Protocol):
    """The rows of a data file, wherever they are."""

    @property
    def path(self) -> Path:
        """The file, for messages."""

    @property
    def rows(self) -> int:
        """Number of rows, at least one."""

    def parts(self) -> Iterator[Table]:
        """All rows in their order, a part at a time; each time it is called. Raises DataError: they cannot be read."""


@dataclass(frozen=True, slots=True)
class Table:
    """The columns of a data file that some task uses, in memory.

    Args:
        path: the file, for error messages.
        columns: values by column name, one list item a row; see `values` for those that can be used.
        names: all column names of the file.
        rows: number of rows, at least one.
        used: columns that someone asked for.
        first: number of its first row in the file, where it is a part of one.
    """

    path: Path
    columns: dict[str, list[Any]]
    names: tuple[str, ...]
    rows: int
    used: set[str] = field(default_factory=set, compare=False)
    first: int = 0

    def parts(self) -> Iterator[Table]:
        """The table in parts of at most `PART_ROWS` rows."""
        for first in range(0, self.rows, PART_ROWS):
            columns = {name: values[first : first + PART_ROWS] for name, values in self.columns.items()}
            count = min(PART_ROWS, self.rows - first)
            yield replace(self, columns=columns, rows=count, first=self.first + first)

    @property
    def characters(self) -> int:
        """How many characters of text it holds."""
        return sum(len(part) for values in self.columns.values() for part in _parts(values) if isinstance(part, str))

    @property
    def longest_row(self) -> int:
        """How many bytes of text the longest row holds, in UTF-8."""
        return max(map(_text_bytes, zip(*self.columns.values(), strict=True)), default=0)

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of the columns that nobody asked for."""
        return tuple(sorted(set(self.names) - self.used))

    def require(self, *names: str, why: str) -> None:
        """Check that the file has these columns. Raises DataError, with `why` as its hint."""
        missing = [name for name in names if name not in self.columns]
        if missing:
            found = listed([_shown(name) for name in self.names]) or "none"
            raise self.error(f"column {missing[0]!r} is missing (found: {found})", hint=why)

    def values(self, name: str) -> list[Any]:
        """A column whose values can all be used. Raises DataError, naming the first row whose value cannot."""
        values = self.columns[name]
        self.used.add(name)
        for row, value in enumerate(values):
            reason = _reason(value)
            if reason is not None:
                hint = f"only columns that are used matter: rename {name!r} if it is not meant"
                raise self.error(f"column {name!r} cannot be read ({reason})", row=row, hint=hint)
        return values

    def texts(self, name: str) -> list[str]:
        """A column that holds a text in every row. Raises DataError, naming the first row that does not."""
        values = self.values(name)
        for row, value in enumerate(values):
            if type(value) is not str:
                raise self.error(f"column {name!r} holds {type_name(value)}, not text", row=row)
            if not value.isascii():
                self.check_characters(name, row, value)
        return values

    def lists(self, name: str) -> list[list[Any]]:
        """A column that holds a list in every row, or the text of one in JSON. Raises DataError as `texts`."""
        return [self.listed(name, row, value) for row, value in enumerate(self.values(name))]

    def listed(self, name: str, row: int, value: Any) -> list[Any]:
        """A value that is a list, or the text of one in JSON. Raises DataError."""
        if type(value) is str and value.lstrip().startswith("["):
            try:
                value = strictjson.loads(value, name)
            except FormatError as error:
                what = f"column {name!r} holds text that is not a list in JSON ({error.what})"
                raise self.error(what, row=row) from None
        if not isinstance(value, list):
            raise self.error(f"column {name!r} holds {type_name(value)}, not a list", row=row)
        return value

    def check_characters(self, name: str, row: int, value: str) -> None:
        """Refuse half of a UTF-16 pair, which JSON can hold, but which is not a character. Raises DataError."""
        try:
            value.encode()
        except UnicodeEncodeError as error:
            what = f"column {name!r} holds U+{ord(value[error.start]):04X} at {error.start}, which is not a character"
            raise self.error(what, row=row) from None

    def error(self, what: str, *, row: int | None = None, hint: str | None = None) -> DataError:
        """An error about this file, or about one of its rows (numbered from 0 here, from 1 in the message)."""
        where = f"{self.path}: row {self.first + row + 1}" if row is not None else str(self.path)
        return DataError(what, where=where, hint=hint)


def _reason(value: object) -> str | None:
    """Why a value, or a part of it, cannot be used; None if all of it can."""
    return next((part.reason for part in _parts(value) if isinstance(part, Unusable)), None)


def _parts(value: object) -> Iterator[object]:
    """A value and all parts of it. No recursion: JSON may be nested as deeply as Python reads it."""
    parts = [value]
    while parts:
        part = parts.pop()
        yield part
        if isinstance(part, (list, dict)):
            parts += part.values() if isinstance(part, dict) else part


def _text_bytes(row: Sequence[object]) -> int:
    """How many bytes all text in a row takes in UTF-8."""
    return sum(len(part.encode(errors="surrogatepass")) for part in _parts(list(row)) if isinstance(part, str))


def type_name(value: object) -> str:
    """A value's type in words."""
    return _TYPE_NAMES.get(type(value), type(value).__name__)


def _shown(name: str) -> str:
    """The name of a column in a message; quoted where blanks at its ends would not be seen."""
    text = name.encode(errors="backslashreplace").decode()
    return text if name == name.strip() else repr(text)
