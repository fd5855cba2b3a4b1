"""Parts of an Apache Parquet file as Python objects: the text, numbers, lists and objects that JSON would give."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
from pyarrow import parquet, types

from fedqsn_cli import strictjson
from fedqsn_cli.errors import DataError, FormatError, InputError
from fedqsn_cli.models.child_process import stream_from_child
from fedqsn_cli.text import size
from fedqsn_cli.training.data import tables
from fedqsn_cli.training.data.tables import COLUMNS, Table, Unusable

BYTES, TIMES = 250_000_000, 100
"""What a file may inflate to: so many bytes, or so many times its size if that is more."""

_NAMES = b"names"  # all columns of the file, told beside those that are wanted
_ROWS_AT_ONCE = 100
_BUFFER = 1 << 20  # bytes of a column that are read at a time
_BYTES_A_SECOND = 20_000_000  # of inflated values, on any machine


def read_parts(file: BinaryIO, path: Path) -> Iterator[Table]:
    """Read the columns that some task uses, a part of the rows at a time; no other column is decoded.

    A child process decodes them: a file of some kilobytes can inflate to terabytes, whatever it says of its size.

    Raises:
        DataError: the file is damaged or encrypted, or inflates to more than `BYTES` and `TIMES` its size.
    """
    most = max(BYTES, TIMES * os.fstat(file.fileno()).st_size)
    pieces = stream_from_child(
        lambda: _decoded(file, path, most),
        what="reading the Parquet file",
        where=path,
        seconds=10 + most / _BYTES_A_SECOND,
        memory=3 * most,  # as they are read, put together, and sent
        reads=[file.fileno()],
    )
    try:
        for piece in pieces:
            yield _table(piece, path)
    except DataError:
        raise
    except InputError as error:
        raise DataError(error.what, where=path, hint="write it as .jsonl") from None


def _table(piece: bytes, path: Path) -> Table:
    """Some rows, from a stream of Arrow."""
    table = pyarrow.ipc.open_stream(piece).read_all()
    columns = {name: _values(table.column(name)) for name in table.column_names}
    return Table(path, columns, tuple(json.loads(table.schema.metadata[_NAMES])), table.num_rows)


def _decoded(file: BinaryIO, path: Path, most: int) -> Iterator[bytes]:
    """The rows as streams of Arrow, each of them some. Raises DataError."""
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # the others reserve more than they use
    try:
        source = parquet.ParquetFile(file, page_checksum_verification=True, buffer_size=_BUFFER)
        names = list(source.schema_arrow.names)
        if len(set(names)) != len(names):
            raise DataError("two columns have the same name", where=path)
        found = [name for name in COLUMNS if name in names]
        schema = pyarrow.schema(
            [source.schema_arrow.field(name) for name in found], metadata={_NAMES: json.dumps(names)}
        )
        batches, total = list[pyarrow.RecordBatch](), 0
        for batch in source.iter_batches(_ROWS_AT_ONCE, columns=found, use_threads=False):
            total += batch.nbytes
            if total > most:
                raise DataError(f"inflates to more than {size(most)}", where=path, hint="write it as .jsonl")
            batches.append(batch)
            if _is_part(batches):
                yield _stream(batches, schema)
                batches.clear()
    except MemoryError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"not a readable Parquet file ({_reason(error)})", where=path) from None
    if batches:
        yield _stream(batches, schema)


def _is_part(batches: Sequence[Any]) -> bool:
    """Are these as many rows as are in memory together?"""
    rows, taken = (sum(getattr(one, name) for one in batches) for name in ("num_rows", "nbytes"))
    return bool(rows >= tables.PART_ROWS or taken >= tables.PART_BYTES)


def _stream(batches: Sequence[Any], schema: Any) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, schema) as stream:
        for batch in batches:
            stream.write_batch(batch.replace_schema_metadata(schema.metadata))
    return bytes(sink.getvalue())


def _values(column: Any) -> list[Any]:
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
            values.append(Unusable(f"a value of type {column.type}: {_reason(error)}"))
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
