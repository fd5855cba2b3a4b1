"""The header of a safetensors file: read strictly, or planned before the first tensor byte exists.

    0        8          8 + n                                     end of file
    | n: <u8 | JSON, n bytes, ends in spaces | tensor | tensor | ... |

The format is the one of https://github.com/huggingface/safetensors ("Format"). This reader refuses more than
the format's own library does: whatever two readers could understand in two ways.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedqsn_cli import strictjson
from fedqsn_cli.checkpoint.files import open_regular_file
from fedqsn_cli.dtypes import DTYPES
from fedqsn_cli.errors import FormatError, InputError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_DIMENSIONS = 32
MAX_NAME = 1000  # characters; those of well-known models have fewer than 200
MAX_COUNT = 2**63 - 1  # largest count of bytes that numpy and pread can address


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one stored tensor is: `nbytes` bytes at the absolute offset `start` of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    file: Path


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What tells one version of a file from another that took its path."""

    device: int
    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, descriptor: int) -> FileIdentity:
        """Of an open file."""
        status = os.fstat(descriptor)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(slots=True)
class Header:
    """A checked header. `entries` are in the order of their bytes in the file."""

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    identity: FileIdentity


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that is going to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].nbytes


def read_header(path: Path, most_bytes: int = MAX_HEADER_BYTES) -> Header:
    """Read and check the header of one safetensors file.

    Args:
        most_bytes: a longer header is refused before it is read.

    Raises:
        InputError: the file cannot be opened.
        FormatError: the header breaks a rule of the format or one of ours.
    """
    descriptor = open_regular_file(path)
    try:
        identity = FileIdentity.of(descriptor)
        text = _header_text(descriptor, identity.size, most_bytes, path)
    finally:
        os.close(descriptor)
    document = strictjson.loads(text, path)
    metadata = _metadata(document.pop("__metadata__", {}), path)
    if not document:
        raise FormatError("holds no tensor", where=path)
    data_start = 8 + len(text)
    entries = [_entry(name, fields, data_start, path) for name, fields in document.items()]
    entries.sort(key=lambda entry: (entry.start, entry.nbytes))
    _check_tiling(entries, data_start, identity.size, path)
    return Header({entry.name: entry for entry in entries}, metadata, identity)


def _header_text(descriptor: int, size: int, most: int, path: Path) -> bytes:
    """The header's JSON with its padding: one object, from the first byte on, that fits into the file."""
    prefix = os.pread(descriptor, 9, 0)
    if len(prefix) < 9:
        raise FormatError(f"not a safetensors file: only {size} bytes long", where=path)
    length = int.from_bytes(prefix[:8], "little")
    if prefix[8:] != b"{" and length > size:
        raise FormatError("not a safetensors file: it does not begin as one", where=path)
    if length > most:
        raise FormatError(f"header of {length} bytes is over the limit of {most}", where=path)
    if 8 + length > size:
        raise FormatError(f"truncated: a header of {length} bytes in a file of {size} bytes", where=path)
    text = os.pread(descriptor, length, 8)
    if len(text) < length:
        raise FormatError("truncated while its header was read", where=path)
    if not text.startswith(b"{"):
        raise FormatError("header does not begin with '{'", where=path)
    if not text.rstrip(b" ").endswith(b"}"):
        raise FormatError("header does not end with '}' and spaces", where=path)
    return text


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if type(value) is not dict or not all(type(text) is str for text in value.values()):
        raise FormatError("__metadata__ is not an object of strings", where=path)
    return value


def _entry(name: str, fields: Any, data_start: int, path: Path) -> TensorEntry:
    """One checked tensor entry, its offsets made absolute."""
    problem = name_problem(name)
    if problem:
        raise FormatError(f"tensor name {name[:MAX_NAME]!r} {problem}", where=path)
    where = f"{path}: {name}"
    if type(fields) is not dict or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError("entry is not an object of exactly dtype, shape and data_offsets", where=where)
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPES:
        raise FormatError(f"unknown dtype {dtype!r}", where=where)
    if not _is_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise FormatError("shape is not a list of at most 32 counts", where=where)
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError("data_offsets are not [begin, end]", where=where)
    itemsize = DTYPES[dtype].nbytes
    if math.prod(count for count in shape if count) * itemsize > MAX_COUNT:
        raise FormatError(f"shape {shape} is too large to address", where=where)
    begin, end = offsets
    nbytes = math.prod(shape) * itemsize
    if end - begin != nbytes:
        raise FormatError(f"{dtype} {shape} needs {nbytes} bytes but data_offsets hold {end - begin}", where=where)
    if begin % itemsize:  # within the data: old writers do not pad the header, and reading needs no alignment
        raise FormatError(
            f"data is not aligned to {itemsize} bytes",
            where=where,
            hint="save the file again with a current version of safetensors",
        )
    return TensorEntry(name, dtype, tuple(shape), data_start + begin, nbytes, path)


def _is_counts(value: Any) -> bool:
    return type(value) is list and all(type(item) is int and 0 <= item <= MAX_COUNT for item in value)


def name_problem(name: str) -> str | None:
    """Say what is wrong with a tensor name, or None if nothing is."""
    if not name:
        return "is empty"
    if len(name) > MAX_NAME:  # a table of many names would be as wide for each of them
        return f"is longer than {MAX_NAME} characters"
    if not name.isprintable():  # NUL, line feeds, lone surrogates, marks that reverse a terminal's text
        return "holds a character that cannot be printed"
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
        return "looks like a path out of the checkpoint"
    if name == "__metadata__":
        return "is reserved"
    return None


def is_plain_file_name(name: object) -> bool:
    """Whether `name` can only mean a visible file right in its directory."""
    return (
        type(name) is str
        and not name_problem(name)
        and not name.startswith(".")
        and "/" not in name
        and "\\" not in name
        and len(name.encode()) <= 255
    )


def _check_tiling(entries: Sequence[TensorEntry], data_start: int, size: int, path: Path) -> None:
    """Tensors must fill the file from the header to the last byte, without holes and overlaps."""
    position = data_start
    for entry in entries:
        if entry.start != position:
            fault = "overlaps the tensor before it" if entry.start < position else "has a hole before it"
            raise FormatError(fault, where=f"{path}: {entry.name}")
        position += entry.nbytes
    if position > size:
        raise FormatError(f"truncated: {position} bytes are announced, {size} are there", where=path)
    if position < size:
        raise FormatError(f"{size - position} bytes follow the last tensor", where=path)


def file_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Put tensors into an order in which every one of them is aligned to its dtype.

    The given order stays if it is one. Else tensors whose bytes are not a multiple of 8 go
    to the end, wide dtypes first.
    """
    ordered = list(specs)
    position = 0
    for spec in ordered:
        if position % DTYPES[spec.dtype].nbytes:
            break
        position += spec.nbytes
    else:
        return ordered
    ragged = [spec for spec in ordered if spec.nbytes % 8]
    ragged.sort(key=lambda spec: -DTYPES[spec.dtype].nbytes)
    return [spec for spec in ordered if spec.nbytes % 8 == 0] + ragged


def plan_file(specs: Sequence[TensorSpec], metadata: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """Lay out a safetensors file before any of its tensors exists.

    Returns:
        The file's first bytes (length, JSON, spaces up to a multiple of 8) and each tensor's absolute offset.

    Raises:
        InputError: the header would be longer than any reader accepts.
        ValueError: there is no tensor, or a name is unusable or given twice (a bug in the caller).
    """
    if not specs:
        raise ValueError("a safetensors file without a tensor is one that read_header refuses")
    ordered = file_order(specs)
    document: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    begins: dict[str, int] = {}
    position = 0
    for spec in ordered:
        if name_problem(spec.name) or spec.name in begins:
            raise ValueError(f"tensor name {spec.name!r} {name_problem(spec.name) or 'is given twice'}")
        begins[spec.name] = position
        end = position + spec.nbytes
        document[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise InputError(f"{len(ordered)} tensors need a header over the limit of {MAX_HEADER_BYTES} bytes")
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + begin for name, begin in begins.items()}
