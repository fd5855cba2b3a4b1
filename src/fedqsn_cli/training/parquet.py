"""Columns of an Apache Parquet file as Python objects: the text, numbers, lists and objects that JSON would give."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
from pyarrow import parquet, types

from fedqsn_cli import strictjson
from fedqsn_cli.errors import DataError, FormatError, InputError
from fedqsn_cli.models.child_process import in_child
from fedqsn_cli.text import size

BYTES, TIMES = 250_000_000, 100
"""What a file may inflate to: so many bytes, or so many times its size if that is more."""

_NAMES, _ROWS = b"names", b"rows"  # what is told of the whole file beside the columns that are wanted
_ROWS_AT_ONCE = 1000
_BYTES_A_SECOND = 20_000_000  # of inflated values, on any machine


def read_columns(
    file: BinaryIO, path: Path, wanted: Sequence[str], problem: Callable[[str], Any]
) -> tuple[tuple[str, ...], dict[str, list[Any]], int]:
    """Read the wanted columns that a file has; no other column is decoded.

    A child process decodes them: a file of some kilobytes can inflate to terabytes, whatever it says of its size.

    Args:
        problem: makes what stands for a value that has no equivalent in Python, from the reason.

    Returns:
        Names of all columns of the file, values by column name (one list item a row), number of rows.

    Raises:
        DataError: the file is damaged or encrypted, or inflates to more than `BYTES` and `TIMES` its size.
    """
    most = max(BYTES, TIMES * os.fstat(file.fileno()).st_size)
    try:
        decoded = in_child(
            lambda: _decoded(file, path, wanted, most),
            what="reading the Parquet file",
            where=path,
            seconds=10 + most / _BYTES_A_SECOND,
            memory=3 * most,  # as they are read, put together, and sent
            reads=[file.fileno()],
        )
    except DataError:
        raise
    except InputError as error:
        raise DataError(error.what, where=path, hint="write it as .jsonl") from None
    table = pyarrow.ipc.open_stream(decoded).read_all()
    names = tuple(json.loads(table.schema.metadata[_NAMES]))
    rows = int(table.schema.metadata[_ROWS])
    return names, {name: _values(table.column(name), problem) for name in table.column_names}, rows


def _decoded(file: BinaryIO, path: Path, wanted: Sequence[str], most: int) -> bytes:
    """The wanted columns as a stream of Arrow. Raises DataError."""
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # the others reserve more than they use
    try:
        source = parquet.ParquetFile(file, page_checksum_verification=True)
        names = list(source.schema_arrow.names)
        if len(set(names)) != len(names):
            raise DataError("two columns have the same name", where=path)
        found = [name for name in wanted if name in names]
        batches, total = [], 0
        for batch in source.iter_batches(_ROWS_AT_ONCE, columns=found, use_threads=False):
            total += batch.nbytes
            if total > most:
                raise DataError(f"inflates to more than {size(most)}", where=path, hint="write it as .jsonl")
            batches.append(batch)
    except MemoryError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"not a readable Parquet file ({_reason(error)})", where=path) from None
    facts = {_NAMES: json.dumps(names), _ROWS: str(source.metadata.num_rows)}
    schema = pyarrow.schema([source.schema_arrow.field(name) for name in found], metadata=facts)
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, schema) as stream:
        for batch in batches:
            stream.write_batch(batch.replace_schema_metadata(facts))
    return bytes(sink.getvalue())


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
