"""Data files of every format into tables. Nothing is fetched, no code is run, and all sizes have limits."""

from __future__ import annotations

import codecs
import csv
import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fedqsn_cli import strictjson
from fedqsn_cli.checkpoint.files import open_regular_file
from fedqsn_cli.errors import DataError, FormatError, InputError
from fedqsn_cli.text import size
from fedqsn_cli.training.tables import COLUMNS, Table, Unusable, type_name

FILE_BYTES, ARRAY_BYTES, ROW_BYTES = 16_000_000_000, 1_000_000_000, 8_000_000
"""The most that a file, a file that is one JSON array, and a row may have."""

_KEPT = frozenset(COLUMNS)
_PEEKED = 1 << 16  # bytes in which a file must show whether it is an array
_LINES_BETWEEN_CHECKS = 4096  # that a file which grows has not outrun its reader
_AS_LINES = "write it as .jsonl, which is read row by row"


def read_table(path: str | Path) -> Table:
    """Read a data file.

    The text of JSON and CSV is taken as it is; other readers guess that "007" is a number and "2020-01-01" a date.

    Args:
        path: a .jsonl, .json (one array), .csv (with a header line) or .parquet file.

    Raises:
        DataError: it is missing, empty, malformed, too large, of another format, or changes while it is read.
    """
    path = Path(path)
    read = READERS.get(path.suffix.lower())
    with _opened(path) as (file, length):
        if read is None:
            raise DataError(f"unsupported file type {path.suffix!r}", where=path, hint="use .jsonl, .csv or .parquet")
        if length == 0:
            raise DataError("the file is empty", where=path)
        table = read(path, file)
        if os.fstat(file.fileno()).st_size != length:
            raise _changed(path)
    if table.rows == 0:
        raise DataError("the file has no rows", where=path)
    return table


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A plain file of a size that can be read, and its length in bytes. Raises DataError."""
    try:
        descriptor = open_regular_file(path)
    except InputError as error:
        raise DataError(error.what, where=path) from None
    with open(descriptor, "rb") as file:
        length = os.fstat(descriptor).st_size
        if length > FILE_BYTES:
            raise DataError(f"{size(length)} are more than the {size(FILE_BYTES)} of a data file", where=path)
        yield file, length


def _read_lines(path: Path, file: BinaryIO) -> Table:
    """One JSON object a line; blank lines are skipped."""
    return _from_objects(path, _objects(path, file))


def _objects(path: Path, file: BinaryIO) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_bounded(path, file, file.readline), 1):
        text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if text.strip():
            where = f"{path}: line {number}"
            yield _object(_json(text, where), where)


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


def _read_json(path: Path, file: BinaryIO) -> Table:
    """One JSON array of objects, or one object a line."""
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
    return _from_objects(path, (_object(row, f"{path}: row {number}") for number, row in enumerate(rows, 1)))


def _json(text: bytes, where: str) -> Any:
    try:
        return strictjson.loads_with(text, where, Unusable)
    except FormatError as error:
        raise DataError(error.what, where=where) from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{type_name(value)}, not a JSON object", where=where)
    return value


def _from_objects(path: Path, rows: Iterable[dict[str, Any]]) -> Table:
    """Keep what some task uses of every row; the rest is forgotten at once."""
    names: dict[str, None] = {}
    columns: dict[str, list[Any]] = {}
    count = 0
    for row in rows:
        names.update(dict.fromkeys(row))
        for name in _KEPT & row.keys():
            if name not in columns:
                columns[name] = [None] * count
        for name, values in columns.items():
            values.append(row.get(name))
        count += 1
    ordered = {name: columns[name] for name in COLUMNS if name in columns}
    return Table(path, ordered, tuple(names), count)


def _read_csv(path: Path, file: BinaryIO) -> Table:
    """Comma-separated values under a header line; every cell is text."""
    largest = csv.field_size_limit(ROW_BYTES)
    rows: list[list[str]] = []
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    try:
        lines = csv.reader(_bounded(path, file, text.readline), strict=True)
        header = next((fields for fields in lines if fields), [])
        for fields in lines:
            if fields and len(fields) != len(header):
                what = f"{len(fields)} fields, but the header has {len(header)}"
                raise DataError(what, where=f"{path}: line {lines.line_num}", hint="quote fields that contain commas")
            rows += [fields] if fields else []
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"not a readable CSV file ({error})", where=path) from None
    finally:
        csv.field_size_limit(largest)
        text.detach()  # else it would close the file
    if len(set(header)) != len(header):
        raise DataError("two columns have the same name", where=path)
    columns = {name: [fields[header.index(name)] for fields in rows] for name in COLUMNS if name in header}
    return Table(path, columns, tuple(header), len(rows))


def _read_parquet(path: Path, file: BinaryIO) -> Table:
    from fedqsn_cli.training import parquet  # pyarrow takes long to import

    names, columns, rows = parquet.read_columns(file, path, COLUMNS, Unusable)
    return Table(path, columns, names, rows)


READERS: dict[str, Callable[[Path, BinaryIO], Table]] = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
