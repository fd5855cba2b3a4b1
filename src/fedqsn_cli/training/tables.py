"""Rows of a training or evaluation file, read once into memory: JSONL, CSV or Parquet, nothing fetched, nothing run."""

from __future__ import annotations

import csv
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedqsn_cli.errors import DataError

KINDS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
COLUMNS = ("text", "text_pair", "label", "prompt", "completion", "messages")

_WORDS: dict[type, str] = {
    type(None): "nothing", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object",
}  # fmt: skip

@dataclass(frozen=True, slots=True)
class Table:
    """The columns of a data file that fedqsn knows.

    Args:
        path: the file, for error messages.
        columns: values by column name, one list item a row.
        found: all column names of the file, known or not.
        rows: number of rows, at least one.
    """

    path: Path
    columns: dict[str, list[Any]]
    found: tuple[str, ...]
    rows: int

    def require(self, *names: str, why: str) -> None:
        """Check that these columns are there. Raises DataError."""
        missing = [name for name in names if name not in self.columns]
        if missing:
            found = ", ".join(self.found) or "none"
            raise self.error(f"column {missing[0]!r} is missing (found: {found})", hint=why)

    def texts(self, name: str) -> list[str]:
        """A column that must hold a string in every row. Raises DataError naming the first row that does not."""
        values = self.columns[name]
        for row, value in enumerate(values):
            if type(value) is not str:
                raise self.error(f"column {name!r} holds {_kind(value)}, not text", row=row)
        return values

    def error(self, what: str, *, row: int | None = None, hint: str | None = None) -> DataError:
        """An error about this file, or about one of its rows (counted from 0 here, from 1 in the message)."""
        place = f"{self.path}: row {row + 1}" if row is not None else str(self.path)
        return DataError(what, where=place, hint=hint)


def read_table(path: str | Path) -> Table:
    """Read a data file whole.

    The file is private: the copy that `datasets` makes of it lives in a temporary directory of the user and is gone
    when this function returns.

    Args:
        path: a .jsonl, .json (one array), .csv (with a header line) or .parquet file.

    Raises:
        DataError: it is missing, empty, of another kind, or malformed.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError("no such file" if not path.exists() else "not a file", where=path)
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise DataError(f"files of kind {path.suffix!r} are not read", where=path, hint="use .jsonl, .csv or .parquet")
    if path.stat().st_size == 0:
        raise DataError("the file is empty", where=path)
    return _load(path, kind)


def _load(path: Path, kind: str) -> Table:
    import datasets

    reader = getattr(datasets.Dataset, f"from_{kind}")
    options = _csv_options(path) if kind == "csv" else {}
    with tempfile.TemporaryDirectory(prefix="fedqsn-") as folder, _silence():
        link = Path(folder) / f"data{path.suffix.lower()}"  # a name in which no character is a pattern
        link.symlink_to(path.absolute())
        try:
            rows = reader(str(link), cache_dir=folder, keep_in_memory=True, **options)
            columns = {name: rows[name][:] for name in COLUMNS if name in rows.column_names}
        except (KeyboardInterrupt, MemoryError):
            raise
        except Exception as error:  # every layer below has exceptions of its own
            raise _unreadable(path, kind, error) from None
    if len(rows) == 0:
        raise DataError("the file holds no rows", where=path)
    return Table(path, columns, tuple(rows.column_names), len(rows))


def _csv_options(path: Path) -> dict[str, Any]:
    """How to read a CSV file: every cell is the text that stands there, be it "007", "NA" or nothing.

    Raises:
        DataError: a line has another number of fields than the header, or the file is no UTF-8 text.
    """
    from datasets import Features, Value

    largest = csv.field_size_limit(2**31 - 1)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, strict=True)
            header = next(lines)
            for fields in lines:
                if fields and len(fields) != len(header):
                    what = f"{len(fields)} fields, but the header has {len(header)}"
                    raise DataError(what, where=f"{path}: line {lines.line_num}", hint="put texts into quotes")
    except (csv.Error, UnicodeDecodeError, StopIteration) as error:
        raise DataError(f"not a readable csv file ({error})", where=path) from None
    finally:
        csv.field_size_limit(largest)
    if len(set(header)) != len(header):
        raise DataError("two columns have one name", where=path)
    features = Features({name: Value("string") for name in header})
    return {"features": features, "keep_default_na": False, "index_col": False, "encoding": "utf-8-sig"}


def _unreadable(path: Path, kind: str, error: Exception) -> DataError:
    """One line about what is wrong with a file that could not be read."""
    if kind == "json":
        line = _first_bad_line(path) if path.suffix.lower() != ".json" else None
        if line is not None:
            return DataError("not a JSON object on one line", where=f"{path}: line {line}")
    if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
        return DataError("the file holds no rows", where=path)
    cause = error.__cause__ or error
    reason = str(cause).strip().splitlines()
    return DataError(f"not a readable {kind} file ({reason[0][:200] if reason else type(cause).__name__})", where=path)


def _first_bad_line(path: Path) -> int | None:
    """Number, from 1, of the first line that is not a JSON object; None if all are."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip() and type(json.loads(line)) is not dict:
                    return number
            except (ValueError, RecursionError):
                return number
    return None


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the progress bars and the log of `datasets` off stderr."""
    import datasets
    from datasets.utils.logging import get_verbosity, set_verbosity

    bars = not datasets.are_progress_bars_disabled()
    verbosity = get_verbosity()
    datasets.disable_progress_bars()
    set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


def _kind(value: object) -> str:
    """A value's type in words."""
    return _WORDS.get(type(value), type(value).__name__)
