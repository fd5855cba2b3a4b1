"""Adapters as updates: U of a tensor is a product of factors, computed for the rows that are asked for.

    U = scaling · B A      [out, in], or its transpose where the tensor is stored as [in, out]

It is computed in double precision and rounded once to fp32, so sums, rules and measures see what they would see of an
update that holds U itself. Factors are never averaged. What belongs to hidden units, rows of B or columns of A, must be
zero: it is not part of U, and no place for anything else.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.artifacts.manifests import ADAPTER_TENSORS, UPDATE_MANIFEST, AdapterRecord, UpdateManifest
from fedqsn_cli.artifacts.update_folder import UPDATE_FORMATS, factor_names
from fedqsn_cli.checkpoint import TensorSpec, read_header
from fedqsn_cli.checkpoint.header import FileIdentity, TensorEntry
from fedqsn_cli.dtypes import DTYPES
from fedqsn_cli.errors import RefusedUpdate
from fedqsn_cli.kernels.values import widened
from fedqsn_cli.merging.updates.adapter_config import read_config
from fedqsn_cli.merging.updates.products import product
from fedqsn_cli.merging.updates.stored_values import ReadBytes, ReadValues, StoredPiece, UpdateSlice, take_entry
from fedqsn_cli.planning.tensor_plan import TensorPlan, UnitAxis

Array = NDArray[Any]

FactorRows = tuple[NDArray[np.float64], StoredPiece]
"""Rows of a factor in double precision, and their bytes."""

KEPT_BYTES = 16 << 20
_NONE: NDArray[np.int64] = np.empty(0, np.int64)


class UntrainedValues:
    """U of a tensor without an adapter: zeros, and always the same ones. One of the `TensorValues`."""

    def __init__(self) -> None:
        self._zeros = np.zeros(0, np.float32)

    def read(self, part: UpdateSlice, read: ReadBytes) -> ReadValues:
        """As many zeros as were asked for."""
        zeros = self._zeros
        if zeros.size < part.count:
            self._zeros = zeros = np.zeros(part.count, np.float32)
        return ReadValues(zeros[: part.count], "F32", (), untrained=True)


@dataclass(frozen=True, slots=True)
class Factor:
    """A factor in the file: [rows, cols] from the absolute offset `start` on."""

    start: int
    dtype: str
    rows: int
    cols: int

    def read(self, first: int, rows: int, read: ReadBytes) -> FactorRows:
        """Some rows."""
        bits = np.dtype(DTYPES[self.dtype].bits)
        start = self.start + first * self.cols * bits.itemsize
        data = read(ADAPTER_TENSORS, start, rows * self.cols * bits.itemsize)
        values = widened(data.view(bits), self.dtype).astype(np.float64)
        return values.reshape(rows, self.cols), StoredPiece(ADAPTER_TENSORS, start, data)


class KeptFactors:
    """Whole factors, which every run of rows of a tensor needs again: the last ones that a merge read, up to a size."""

    def __init__(self, most_bytes: int = KEPT_BYTES) -> None:
        self._most = most_bytes
        self._bytes = 0
        self._lock = threading.Lock()
        self._kept: dict[tuple[Factor, ReadBytes], FactorRows] = {}

    def read(self, factor: Factor, read: ReadBytes) -> FactorRows:
        """All rows of a factor; from any thread."""
        with self._lock:
            found = self._kept.get((factor, read))
        if found is None:
            found = factor.read(0, factor.rows, read)
            with self._lock:
                self._keep((factor, read), found)
        return found

    def _keep(self, key: tuple[Factor, ReadBytes], rows: FactorRows) -> None:
        if key not in self._kept:
            self._kept[key] = rows
            self._bytes += rows[0].nbytes
        while self._bytes > self._most:
            oldest = next(iter(self._kept))
            self._bytes -= self._kept.pop(oldest)[0].nbytes


@dataclass(frozen=True, slots=True)
class AdapterValues:
    """The U of one tensor as a product: one of the `TensorValues`.

    Args:
        a: [rank, in]. b: [out, rank].
        axis: along which U has units; None where it holds all elements.
        kept: where factors are kept from one run of rows to the next.
    """

    where: str
    a: Factor
    b: Factor
    scaling: float
    transposed: bool
    axis: UnitAxis | None
    kept: KeptFactors

    def read(self, part: UpdateSlice, read: ReadBytes) -> ReadValues:
        """Whole rows of U.

        Raises:
            RefusedUpdate: a factor is not zero where it belongs to a hidden unit.
        """
        left, right, pieces = self._factors(part, read)
        if self.axis == "row":
            self._require_zeros(np.delete(left, part.index, axis=0))
            left = left[part.index]
        elif self.axis == "column":
            self._require_zeros(np.delete(right, part.index, axis=1))
            right = right[:, part.index]
        return ReadValues(product(left, right, self.scaling).reshape(-1), "F32", pieces)

    def whole(self, read: ReadBytes) -> tuple[Array, Array]:
        """Left [rows, rank] and right [rank, cols] factor of all of U, hidden units included."""
        left, right, _ = self._factors(
            UpdateSlice(0, (self.a.cols if self.transposed else self.b.rows), 0, 0, _NONE), read
        )
        return left, right

    def _factors(self, part: UpdateSlice, read: ReadBytes) -> tuple[Array, Array, tuple[StoredPiece, ...]]:
        """Left [rows, rank] and right [rank, cols] factor of a run of rows, hidden units included."""
        a, a_piece = self.kept.read(self.a, read)
        if self.transposed:
            b, b_piece = self.kept.read(self.b, read)
            return a.T[part.row : part.row + part.rows], b.T, (a_piece, b_piece)
        b, b_piece = self.b.read(part.row, part.rows, read)
        return b, a, (a_piece, b_piece)

    def _require_zeros(self, hidden: Array) -> None:
        if hidden.any():
            raise RefusedUpdate("the adapter is not zero in hidden units", where=self.where)


class AdapterFolder:
    """The adapters of an update, checked as far as that is possible without reading their values.

    Args:
        kept: where factors are kept while they are needed; one for all updates of a merge.
        entries: tensors of the file that nothing has asked for yet.
    """

    def __init__(self, folder: Path, manifest: UpdateManifest, most_header_bytes: int, kept: KeptFactors) -> None:
        """Open a folder whose manifest lists adapters.

        Raises:
            RefusedUpdate, FormatError, InputError: the configuration contradicts update.json, or a file is malformed.
        """
        if UPDATE_FORMATS[manifest.precision].coding is not None:
            raise RefusedUpdate(f"factors are never sent as {manifest.precision}", where=folder / UPDATE_MANIFEST)
        read_config(folder, manifest)
        header = read_header(folder / ADAPTER_TENSORS, most_header_bytes)
        self.identity: FileIdentity = header.identity
        self.entries = header.entries
        self._folder, self._kept = folder, kept
        self._dtype = UPDATE_FORMATS[manifest.precision].dtype
        self._records = dict(manifest.adapters or {})
        self._saved = dict(manifest.saved or {})
        self._untrained = UntrainedValues()

    def take(self, tensor: TensorPlan, axis: UnitAxis | None) -> AdapterValues | UntrainedValues | None:
        """How U of a tensor is computed; None if the update holds it.

        Args:
            axis: along which U has units; None where it holds all elements.

        Raises:
            RefusedUpdate: a factor is missing, is not as it should be, or the tensor can have no adapter.
        """
        record, saved = self._records.pop(tensor.name, None), self._saved.pop(tensor.name, None)
        if record is not None and saved is not None:
            raise RefusedUpdate("the tensor has an adapter and was trained in full", where=self._where(tensor.name))
        if saved is not None:
            self._entry(saved, tensor.shape)
            return None
        return self._values(tensor, record, axis) if record is not None else self._untrained

    def finish(self) -> None:
        """Refuse what no tensor of the model has asked for. Raises RefusedUpdate."""
        for name in (*self._records, *self._saved, *self.entries):
            raise RefusedUpdate("the model has no such tensor", where=self._where(name))

    def _values(self, tensor: TensorPlan, record: AdapterRecord, axis: UnitAxis | None) -> AdapterValues:
        where = self._where(tensor.name)
        if tensor.view != (1, *tensor.shape) or axis == "element":
            raise RefusedUpdate("this tensor can have no adapter", where=where)
        if record.rank > min(tensor.shape):
            what = f"an adapter of rank {record.rank} is larger than the tensor, {list(tensor.shape)}"
            raise RefusedUpdate(what, where=where)
        outputs, inputs = reversed(tensor.shape) if record.transposed else tensor.shape
        a, b = factor_names(record.module)
        return AdapterValues(
            where,
            self._factor(a, (record.rank, inputs)),
            self._factor(b, (outputs, record.rank)),
            record.scaling,
            record.transposed,
            axis,
            self._kept,
        )

    def _factor(self, name: str, shape: tuple[int, int]) -> Factor:
        return Factor(self._entry(name, shape).start, self._dtype, *shape)

    def _entry(self, name: str, shape: tuple[int, ...]) -> TensorEntry:
        """Take a tensor of the file that must be there, in this shape."""
        return take_entry(self.entries, TensorSpec(name, self._dtype, shape), self._folder)

    def _where(self, name: str) -> str:
        return f"{self._folder}: {name}"
