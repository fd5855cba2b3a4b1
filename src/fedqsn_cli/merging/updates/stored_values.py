"""Where the U of a tensor is in an update, and how a slice of it is read: values, or codes and scales."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.artifacts.manifests import UPDATE_TENSORS
from fedqsn_cli.artifacts.update_folder import SCALES, Coding, StoredFormat, stored_specs
from fedqsn_cli.checkpoint import TensorSpec
from fedqsn_cli.checkpoint.header import TensorEntry
from fedqsn_cli.dtypes import DTYPES
from fedqsn_cli.errors import RefusedUpdate
from fedqsn_cli.quantization.runs import MalformedCodes, decode_run

Array = NDArray[Any]
Bytes = NDArray[np.uint8]
ReadBytes = Callable[[str, int, int], Bytes]
"""Reads a number of bytes of a file of the update, from an absolute offset on: (name, start, count)."""


@dataclass(frozen=True, slots=True)
class UpdateSlice:
    """The elements of U that belong to a run of rows, and their positions in it.

    Args:
        row, rows: the run: rows `row` .. `row + rows` of the tensor.
        first, count: the elements of U.
        index: flat positions within the run of rows of the first element of each seen unit (row), seen column numbers
            (column), or flat positions of elements (element).
    """

    row: int
    rows: int
    first: int
    count: int
    index: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """Bytes of a file, from the absolute offset `start` on."""

    file: str
    start: int
    data: Bytes


@dataclass(frozen=True, slots=True)
class ReadValues:
    """A slice of U.

    Args:
        values: stored bits, or the fp32 values that codes stand for. dtype: F32, F16 or BF16.
        pieces: the bytes that were read for it. untrained: whether nothing was read, since all of U is zeros.
    """

    values: Array
    dtype: str
    pieces: tuple[StoredPiece, ...]
    untrained: bool = False


class TensorValues(Protocol):
    """The U of one tensor, however an update stores it: all that sums, rules and measures know of an update's values.

    They ask for elements in C order of the shape that the release calls for (`update_folder`), in rising order and from
    several threads. An implementation reads its bytes with `read`, so that the digests of files cover them: what it
    returns as `pieces` is hashed as it was read, and bytes that are in no piece are read once more for the digest.
    """

    def read(self, part: UpdateSlice, read: ReadBytes) -> ReadValues:
        """Elements `part.first` .. `part.first + part.count` of U. Raises RefusedUpdate: they are malformed."""


def take_entry(entries: dict[str, TensorEntry], spec: TensorSpec, folder: Path) -> TensorEntry:
    """Take a tensor out of `entries`, those of a file that nothing has asked for yet.

    Raises:
        RefusedUpdate: it is missing, or has another dtype or shape.
    """
    where, entry = f"{folder}: {spec.name}", entries.pop(spec.name, None)
    if entry is None:
        raise RefusedUpdate("the tensor is missing", where=where)
    if (entry.dtype, entry.shape) != (spec.dtype, spec.shape):
        found, wanted = f"{entry.dtype} {list(entry.shape)}", f"{spec.dtype} {list(spec.shape)}"
        raise RefusedUpdate(f"expected {wanted}, found {found}", where=where)
    return entry


@dataclass(frozen=True, slots=True)
class StoredValues:
    """The U of one tensor as values, or as codes and scales: one of the `TensorValues`.

    Args:
        size: elements of U.
        start: absolute offset of the values or codes. scales: that of the block scales; 0 where there are none.
    """

    where: str
    stored: StoredFormat
    size: int
    start: int
    scales: int

    @classmethod
    def take(
        cls, entries: dict[str, TensorEntry], name: str, stored: StoredFormat, shape: tuple[int, ...], folder: Path
    ) -> StoredValues:
        """Take the tensors that hold the U of one tensor out of `entries`, after checking their dtypes and shapes.

        Args:
            shape: of U, as the release calls for it.

        Raises:
            RefusedUpdate: one is missing, or is not as it should be.
        """
        starts = {}
        for spec in stored_specs(name, stored, shape):
            starts[spec.name] = take_entry(entries, spec, folder).start
        return cls(f"{folder}: {name}", stored, math.prod(shape), starts[name], starts.get(name + SCALES, 0))

    def read(self, part: UpdateSlice, read: ReadBytes) -> ReadValues:
        """Elements of U, in C order.

        Raises:
            RefusedUpdate: a code or scale is none that `client-train` writes.
        """
        if self.stored.coding is not None:
            return self._decoded(self.stored.coding, part.first, part.count, read)
        bits = np.dtype(DTYPES[self.stored.dtype].bits)
        start = self.start + part.first * bits.itemsize
        data = read(UPDATE_TENSORS, start, part.count * bits.itemsize)
        return ReadValues(data.view(bits), self.stored.dtype, (StoredPiece(UPDATE_TENSORS, start, data),))

    def _decoded(self, coding: Coding, first: int, count: int, read: ReadBytes) -> ReadValues:
        """Decode whole blocks, and cut off what was not asked for."""
        begin = first // coding.block
        end = -(-(first + count) // coding.block) if count else begin
        skipped = begin * coding.block
        values = max(0, min(end * coding.block, self.size) - skipped)
        codes_at = self.start + skipped // coding.per_byte
        codes = read(UPDATE_TENSORS, codes_at, -(-values // coding.per_byte))
        scales_at = self.scales + 4 * begin
        scales = read(UPDATE_TENSORS, scales_at, 4 * (end - begin))
        try:
            out = decode_run(codes, scales.view(np.float32), coding.format, coding.block, values)
        except MalformedCodes as error:
            raise RefusedUpdate(str(error), where=self.where) from None
        pieces = (StoredPiece(UPDATE_TENSORS, scales_at, scales), StoredPiece(UPDATE_TENSORS, codes_at, codes))
        return ReadValues(out[first - skipped : first - skipped + count], "F32", pieces)
