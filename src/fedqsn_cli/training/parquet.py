"""Columns of an Apache Parquet file as Python objects: the text, numbers, lists and objects that JSON would give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet, types

from fedqsn_cli import strictjson
from fedqsn_cli.errors import DataError, FormatError


def read_columns(
    path: Path, wanted: Sequence[str], problem: Callable[[str], Any]
) -> tuple[tuple[str, ...], dict[str, list[Any]], int]:
    """Read the wanted columns that a file has; no other column is decoded.

    Args:
        problem: makes what stands for a value that has no equivalent in Python, from the reason.

    Returns:
        Names of all columns of the file, values by column name (one list item a row), number of rows.

    Raises:
        DataError: the file is damaged or encrypted.
    """
    with path.open("rb") as stream:
        try:
            file = parquet.ParquetFile(stream, page_checksum_verification=True)
            names = tuple(file.schema_arrow.names)
            found = [name for name in wanted if name in names]
            table = file.read(columns=found)
        except MemoryError:
            raise
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DataError(f"not a readable Parquet file ({_reason(error)})", where=path) from None
    if len(set(names)) != len(names):
        raise DataError("two columns have the same name", where=path)
    return names, {name: _values(table.column(name), problem) for name in found}, file.metadata.num_rows


def _values(column: Any, problem: Callable[[str], Any]) -> list[Any]:
    """A column as Python objects: dictionaries are decoded, JSON documents parsed, null is None."""
    has_json = _has_json(column.type)
    values: list[Any] = []
    for scalar in column:
        try:
            value = scalar.as_py(maps_as_pydicts="strict")
            values.append(_parsed(value, column.type) if has_json else value)
        except MemoryError:
            raise
        except (pyarrow.ArrowException, FormatError, ValueError, ArithmeticError, KeyError, ImportError) as error:
            # Text that is not UTF-8, JSON that is not valid, a time that Python cannot hold, a map with a key twice.
            values.append(problem(f"a value of type {column.type}: {_reason(error)}"))
    return values


def _has_json(kind: Any) -> bool:
    """Does an Arrow type hold JSON documents, at any depth?"""
    return isinstance(kind, pyarrow.JsonType) or any(_has_json(kind.field(i).type) for i in range(kind.num_fields))


def _parsed(value: Any, kind: Any) -> Any:
    """A value with the JSON documents in it parsed. Raises FormatError."""
    if value is None:
        return None
    if isinstance(kind, pyarrow.JsonType):
        return strictjson.loads(value.encode(), "JSON")
    if types.is_struct(kind):
        return {field.name: _parsed(value[field.name], field.type) for field in kind}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return [_parsed(item, kind.value_type) for item in value]
    return value


def _reason(error: Exception) -> str:
    """The first line of what a library says about an error."""
    text = error.what if isinstance(error, FormatError) else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0][:200]
