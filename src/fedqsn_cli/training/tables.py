"""Training and evaluation files, read whole into memory: JSONL, CSV or Parquet. Nothing is fetched, no code is run."""

from __future__ import annotations

import codecs
import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedqsn_cli import strictjson
from fedqsn_cli.errors import DataError, FormatError

COLUMNS = (
    *("text", "text_pair", "label", "tokens", "tags"),
    *("prompt", "completion", "messages", "source", "target"),
)
"""Names of all columns that some task uses (`tasks`); others are not kept in memory."""

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


@dataclass(frozen=True, slots=True)
class Table:
    """The columns of a data file that some task uses.

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

    def parts(self, rows: int) -> Iterator[Table]:
        """The table in parts of at most so many rows."""
        for first in range(0, self.rows, rows):
            columns = {name: values[first : first + rows] for name, values in self.columns.items()}
            count = min(rows, self.rows - first)
            yield replace(self, columns=columns, rows=count, first=self.first + first)

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of the columns that nobody asked for."""
        return tuple(sorted(set(self.names) - self.used))

    def require(self, *names: str, why: str) -> None:
        """Check that the file has these columns. Raises DataError, with `why` as its hint."""
        missing = [name for name in names if name not in self.columns]
        if missing:
            found = ", ".join(name.encode(errors="backslashreplace").decode() for name in self.names) or "none"
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
                what = f"column {name!r} holds text that is no list in JSON ({error.what})"
                raise self.error(what, row=row) from None
        if not isinstance(value, list):
            raise self.error(f"column {name!r} holds {type_name(value)}, not a list", row=row)
        return value

    def check_characters(self, name: str, row: int, value: str) -> None:
        """Refuse half of a UTF-16 pair, which JSON can hold, but which is no character. Raises DataError."""
        try:
            value.encode()
        except UnicodeEncodeError as error:
            what = f"column {name!r} holds U+{ord(value[error.start]):04X} at {error.start}, which is no character"
            raise self.error(what, row=row) from None

    def error(self, what: str, *, row: int | None = None, hint: str | None = None) -> DataError:
        """An error about this file, or about one of its rows (numbered from 0 here, from 1 in the message)."""
        where = f"{self.path}: row {self.first + row + 1}" if row is not None else str(self.path)
        return DataError(what, where=where, hint=hint)


def read_table(path: str | Path) -> Table:
    """Read a data file.

    The text of JSON and CSV is taken as it is; other readers guess that "007" is a number and "2020-01-01" a date.

    Args:
        path: a .jsonl, .json (one array), .csv (with a header line) or .parquet file.

    Raises:
        DataError: it is missing, empty, malformed, or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError("no such file" if not path.exists() else "not a file", where=path)
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise DataError(f"unsupported file type {path.suffix!r}", where=path, hint="use .jsonl, .csv or .parquet")
    if path.stat().st_size == 0:
        raise DataError("the file is empty", where=path)
    table = read(path)
    if table.rows == 0:
        raise DataError("the file has no rows", where=path)
    return table


def _read_lines(path: Path) -> Table:
    """One JSON object a line; blank lines are skipped."""
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if text.strip():
                rows.append(_object(_json(text, f"{path}: line {number}"), f"{path}: line {number}"))
    return _from_objects(path, rows)


def _read_json(path: Path) -> Table:
    """One JSON array of objects, or one object a line."""
    text = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if not text.lstrip().startswith(b"["):
        return _read_lines(path)
    rows = _json(text, str(path))
    return _from_objects(path, [_object(row, f"{path}: row {number}") for number, row in enumerate(rows, 1)])


def _json(text: bytes, where: str) -> Any:
    try:
        return strictjson.loads_with(text, where, Unusable)
    except FormatError as error:
        raise DataError(error.what, where=where) from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{type_name(value)}, not a JSON object", where=where)
    return value


def _from_objects(path: Path, rows: list[dict[str, Any]]) -> Table:
    names = tuple(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in COLUMNS if name in names}
    return Table(path, columns, names, len(rows))


def _read_csv(path: Path) -> Table:
    """Comma-separated values under a header line; every cell is text."""
    largest = csv.field_size_limit(2**31 - 1)
    rows: list[list[str]] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, strict=True)
            header = next(lines, [])
            for fields in lines:
                if fields and len(fields) != len(header):
                    what = f"{len(fields)} fields, but the header has {len(header)}"
                    raise DataError(
                        what, where=f"{path}: line {lines.line_num}", hint="quote fields that contain commas"
                    )
                rows += [fields] if fields else []
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"not a readable CSV file ({error})", where=path) from None
    finally:
        csv.field_size_limit(largest)
    if len(set(header)) != len(header):
        raise DataError("two columns have the same name", where=path)
    columns = {name: [fields[header.index(name)] for fields in rows] for name in COLUMNS if name in header}
    return Table(path, columns, tuple(header), len(rows))


def _read_parquet(path: Path) -> Table:
    from fedqsn_cli.training import parquet  # pyarrow takes long to import

    names, columns, rows = parquet.read_columns(path, COLUMNS, Unusable)
    return Table(path, columns, names, rows)


READERS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _reason(value: object) -> str | None:
    """Why a value, or a part of it, cannot be used; None if all of it can."""
    if isinstance(value, Unusable):
        return value.reason
    if isinstance(value, (list, dict)):
        parts = value.values() if isinstance(value, dict) else value
        return next((reason for reason in map(_reason, parts) if reason is not None), None)
    return None


def type_name(value: object) -> str:
    """A value's type in words."""
    return _TYPE_NAMES.get(type(value), type(value).__name__)
