"""Data files of every format into tables, a part of the rows at a time.

Nothing is fetched, no code is run, and all sizes have limits. A file is read twice: once to know that it can be read
and which columns it has, before anything is computed; and again when its rows are used.
"""

from __future__ import annotations

import codecs
import csv
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fedqsn_cli import strictjson
from fedqsn_cli.checkpoint.files import open_regular_file
from fedqsn_cli.errors import DataError, FormatError, InputError
from fedqsn_cli.text import size
from fedqsn_cli.training.data import tables
from fedqsn_cli.training.data.tables import COLUMNS, Table, Unusable, type_name

FILE_BYTES, ARRAY_BYTES, ROW_BYTES = 16_000_000_000, 1_000_000_000, 8_000_000
"""The most that a file, a file that is one JSON array, and a row may have."""

_KEPT = frozenset(COLUMNS)
_PEEKED = 1 << 16  # bytes in which a file must show whether it is an array
_LINES_BETWEEN_CHECKS = 4096  # that a file which grows has not outrun its reader
_AS_LINES = "write it as .jsonl, which is read row by row"


@dataclass(frozen=True, slots=True)
class DataFile:
    """A data file that was read once, part by part: all of its rows are well formed, and its columns are known.

    Args:
        path: the file.
        names: all column names of the file. columns: those that some task uses.
        rows: number of rows, at least one.
        state: what changes when the file does.
        whole: all rows, where they are few.
    """

    path: Path
    names: tuple[str, ...]
    columns: tuple[str, ...]
    rows: int
    state: tuple[int, ...]
    whole: Table | None

    def parts(self) -> Iterator[Table]:
        """The rows, a part at a time; they are read from the file again unless they are few.

        Raises:
            DataError: the file has changed.
        """
        if self.whole is not None:
            yield self.whole
            return
        first = 0
        with _opened(self.path) as (file, state):
            if state != self.state:
                raise _changed(self.path)
            for part in _reader(self.path)(self.path, file):
                nothing = [None] * part.rows
                columns = {name: part.columns.get(name, nothing) for name in self.columns}
                yield Table(self.path, columns, self.names, part.rows, first=first)
                first += part.rows
            if _state(file) != self.state:
                raise _changed(self.path)

    def table(self) -> Table:
        """All rows in memory."""
        columns: dict[str, list[Any]] = {name: [] for name in self.columns}
        for part in self.parts():
            for name, values in columns.items():
                values += part.columns[name]
        return Table(self.path, columns, self.names, self.rows)


def open_data(path: str | Path) -> DataFile:
    """Look through a data file; no more than a part of its rows is in memory at a time.

    The text of JSON and CSV is taken as it is; other readers guess that "007" is a number and "2020-01-01" a date.

    Args:
        path: a .jsonl, .json (one array), .csv (with a header line) or .parquet file.

    Raises:
        DataError: it is missing, empty, malformed, too large, of another format, or changes while it is read.
    """
    path = Path(path)
    names: dict[str, None] = {}
    columns: set[str] = set()
    rows = 0
    whole: Table | None = None
    with _opened(path) as (file, state):
        if os.fstat(file.fileno()).st_size == 0:
            raise DataError("the file is empty", where=path)
        for part in _reader(path)(path, file):
            names.update(dict.fromkeys(part.names))
            columns.update(part.columns)
            whole = part if rows == 0 else None
            rows += part.rows
        if _state(file) != state:
            raise _changed(path)
    if rows == 0:
        raise DataError("the file has no rows", where=path)
    return DataFile(path, tuple(names), tuple(name for name in COLUMNS if name in columns), rows, state, whole)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, tuple[int, ...]]]:
    """A plain file of a size that can be read, and its state. Raises DataError."""
    try:
        descriptor = open_regular_file(path)
    except InputError as error:
        raise DataError(error.what, where=path) from None
    with open(descriptor, "rb") as file:
        length = os.fstat(descriptor).st_size
        if length > FILE_BYTES:
            raise DataError(f"{size(length)} are more than the {size(FILE_BYTES)} of a data file", where=path)
        yield file, _state(file)


def _state(file: BinaryIO) -> tuple[int, ...]:
    """What changes when a file is written to, or when another takes its place."""
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _reader(path: Path) -> Reader:
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise DataError(
            f"unsupported file type {path.suffix!r}", where=path, hint="use .jsonl, .json, .csv or .parquet"
        )
    return read


def _read_lines(path: Path, file: BinaryIO) -> Iterator[Table]:
    """One JSON object a line; blank lines are skipped."""
    return _parts(path, _objects(path, file))


def _objects(path: Path, file: BinaryIO) -> Iterator[tuple[dict[str, Any], int]]:
    for number, line in enumerate(_bounded(path, file, file.readline), 1):
        text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if text.strip():
            where = f"{path}: line {number}"
            yield _object(_json(text, where), where), len(line)


def _bounded(path: Path, file: BinaryIO, readline: Callable[[int], Any]) -> Iterator[Any]:
    """The lines of a file, as bytes or text, none of them longer than a row may be. Raises DataError."""
    length, number = os.fstat(file.fileno()).st_size, 0
    while line := readline(ROW_BYTES + 1):
        number += 1
        if len(line) > ROW_BYTES:
            raise DataError(f"longer than the {size(ROW_BYTES)} of a row", where=f"{path}: line {number}")
        if number % _LINES_BETWEEN_CHECKS == 0 and file.tell() > length:
            raise _changed(path)
        yield line


def _changed(path: Path) -> DataError:
    return DataError("the file changes while it is read", where=path, hint="wait until it is complete")


def _read_json(path: Path, file: BinaryIO) -> Iterator[Table]:
    """One JSON array of objects, which is read whole, or one object a line."""
    beginning = file.read(_PEEKED).removeprefix(codecs.BOM_UTF8).lstrip()
    file.seek(0)
    if not beginning.startswith(b"["):
        return _read_lines(path, file)
    text = file.read(ARRAY_BYTES + 1).removeprefix(codecs.BOM_UTF8)
    if len(text) > ARRAY_BYTES:
        raise DataError(f"larger than the {size(ARRAY_BYTES)} of an array", where=path, hint=_AS_LINES)
    if strictjson.has_too_many_values(text):
        raise DataError(f"an array of more than {strictjson.MOST_VALUES} values", where=path, hint=_AS_LINES)
    rows = _json(text, str(path))
    return _parts(path, ((_object(row, f"{path}: row {number}"), 0) for number, row in enumerate(rows, 1)))


def _json(text: bytes, where: str) -> Any:
    try:
        return strictjson.loads_with(text, where, Unusable)
    except FormatError as error:
        raise DataError(error.what, where=where) from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{type_name(value)}, not a JSON object", where=where)
    return value


def _parts(path: Path, rows: Iterable[tuple[Mapping[str, Any], int]]) -> Iterator[Table]:
    """Tables of what some task uses of successive rows; the rest is forgotten at once.

    Args:
        rows: values by column name, and how many bytes of the file they take.
    """
    part, taken = _Part(), 0
    for row, length in rows:
        part.add(row)
        taken += length
        if part.rows == tables.PART_ROWS or taken >= tables.PART_BYTES:
            yield part.table(path)
            part, taken = _Part(), 0
    if part.rows:
        yield part.table(path)


class _Part:
    """Columns that grow by a row at a time; a row may lack some."""

    def __init__(self) -> None:
        self.rows = 0
        self._names: dict[str, None] = {}
        self._columns: dict[str, list[Any]] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        self._names.update(dict.fromkeys(row))
        for name in _KEPT & row.keys():
            if name not in self._columns:
                self._columns[name] = [None] * self.rows
        for name, values in self._columns.items():
            values.append(row.get(name))
        self.rows += 1

    def table(self, path: Path) -> Table:
        """All rows."""
        ordered = {name: self._columns[name] for name in COLUMNS if name in self._columns}
        return Table(path, ordered, tuple(self._names), self.rows)


def _read_csv(path: Path, file: BinaryIO) -> Iterator[Table]:
    """Comma-separated values under a header line; every cell is text."""
    return _parts(path, _records(path, file))


def _records(path: Path, file: BinaryIO) -> Iterator[tuple[dict[str, str], int]]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    try:
        lines = csv.reader(_bounded(path, file, text.readline), strict=True)
        records = iter(lambda: _next(lines), None)
        header = next(filter(None, records), [])
        if len(set(header)) != len(header):
            raise DataError("two columns have the same name", where=path)
        for fields in records:
            if fields and len(fields) != len(header):
                what = f"{len(fields)} fields, but the header has {len(header)}"
                raise DataError(what, where=f"{path}: line {lines.line_num}", hint="quote fields that contain commas")
            if fields:
                yield dict(zip(header, fields, strict=True)), sum(map(len, fields))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"not a readable CSV file ({error})", where=path) from None
    finally:
        text.detach()  # else it would close the file


def _next(lines: Iterator[list[str]]) -> list[str] | None:
    """The next record, whose cells may be as long as a row; None at the end. The limit is one for all of Python."""
    largest = csv.field_size_limit(ROW_BYTES)
    try:
        return next(lines, None)
    finally:
        csv.field_size_limit(largest)


def _read_parquet(path: Path, file: BinaryIO) -> Iterator[Table]:
    from fedqsn_cli.training.data import parquet  # pyarrow takes long to import

    return parquet.read_parts(file, path)


Reader = Callable[[Path, BinaryIO], Iterator[Table]]

READERS: dict[str, Reader] = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
