"""FQ002 and FQ007 over whole models: sketch the truth once, then look for its hidden units where they may not be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.artifacts.manifests import PROXY_MANIFEST, VISIBLE_TENSORS
from fedqsn_cli.auditing.checks import Together, check, each_proxy
from fedqsn_cli.auditing.digests import files_of, is_oversized
from fedqsn_cli.auditing.findings import Entry, Finding
from fedqsn_cli.auditing.inputs import TRUTH, Inputs
from fedqsn_cli.auditing.invariants.holes import CLEAR_COPY, HIDDEN_UNIT_PRESENT
from fedqsn_cli.auditing.invariants.sketches import (
    SHORTEST,
    HashTable,
    Sketches,
    cosine,
    hash_tables,
    joined,
    of_rows,
    window,
)
from fedqsn_cli.auditing.invariants.truth_index import MatrixSketches, Part, TruthIndex, fetch, matrix_view, origins
from fedqsn_cli.auditing.opened_proxy import OpenedProxy
from fedqsn_cli.auditing.truth_pass import truth_index
from fedqsn_cli.checkpoint.files import open_regular_file
from fedqsn_cli.dtypes import DTYPES
from fedqsn_cli.export.pipeline import CHUNK_ELEMENTS
from fedqsn_cli.kernels.read_ahead import compute_ahead
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.quantization import kernels
from fedqsn_cli.quantization.layout import TensorLayout, row_chunks

Array = NDArray[Any]
Floats = NDArray[np.float32]
ReadBytes = Callable[[int, int], bytes]
"""(first byte, how many) -> bytes."""

SAME, COPY, SHORT_COPY = 0.9999, 0.98, 1 - 1e-6  # cosines; see sketches.py
_SHORT = 16  # numbers; below, unrelated vectors may be alike by chance
_COMPARISONS = 16  # pairs a tensor that are compared number by number
_AT_ONCE = 16  # tensors whose vectors are looked up in one call
_READ = 1 << 22  # bytes of unexpected content at a time
_HIDDEN, _SHOWN, _NOTHING = 2, 1, 0  # what a vector is a copy of


def _truth(inputs: Inputs) -> list[Together]:
    return [] if inputs.truth is None else [Together(("truth",))]


@check(HIDDEN_UNIT_PRESENT, _truth, TRUTH, problem="cannot be searched")
def copies_in_truth(inputs: Inputs, group: Together, model: OpenModel) -> Iterator[Entry]:
    """Does the truth itself show its hidden units elsewhere?"""
    found = list(_in_truth(truth_index(inputs, model)))
    yield from HIDDEN_UNIT_PRESENT.checked("truth", _compared_with(inputs), found)


@check(
    HIDDEN_UNIT_PRESENT,
    each_proxy,
    TRUTH,
    more=", to look for its hidden units everywhere",
    problem="cannot be searched",
)
def copies_in_proxy(inputs: Inputs, proxy: OpenedProxy, model: OpenModel) -> Iterator[Entry]:
    """Look through the tensors that are not as an export makes them, and through all that is not listed."""
    truth = truth_index(inputs, model)
    found = [
        finding for number, name in truth.find(proxy.suspects) for finding in _in_tensor(truth, proxy, number, name)
    ]
    for label, read, size in _unexpected(truth, proxy):
        found += _in_bytes(truth, proxy, label, read, size)
    yield from HIDDEN_UNIT_PRESENT.checked(proxy.scope, _compared_with(inputs), found)


def _compared_with(inputs: Inputs) -> str:
    known = "that the key hides" if inputs.job else "that no given proxy shows (no --key)"
    return f"rows and columns of all tensors were compared with the units {known}"


def _in_truth(truth: TruthIndex) -> Iterator[Finding]:
    """Hidden units that the truth holds once more where they are shown."""
    reported: set[Pair] = set()
    for length in truth.lengths():
        if length < _SHORT:
            continue
        parts, in_part = truth.parts(length), truth.partially_hidden
        units = joined([part.only(part.hidden) for part in parts])
        shown = [part.only(~part.hidden | in_part[part.where[:, 0]]) for part in parts]
        runs = [shown[first : first + _AT_ONCE] for first in range(0, len(shown), _AT_ONCE)]
        for table in hash_tables(units.vectors, sum(len(part.where) for part in shown), tables=3):
            for found in compute_ahead(partial(_shown_copies, truth, table, units.where, run) for run in runs):
                for pair in sorted(found - reported):
                    message = f"units that are hidden here are shown as part of {truth.tasks[pair[1]].name}"
                    yield HIDDEN_UNIT_PRESENT.finding("truth", message, tensor=truth.tasks[pair[0]].name)
                reported |= found


Pair = tuple[int, int]
"""Numbers of two tensors: the one that a hidden unit is of, and the one that shows it."""


def _shown_copies(truth: TruthIndex, table: HashTable, where: Array, parts: Sequence[Part]) -> set[Pair]:
    """Tensors whose hidden units these parts of the truth show.

    Args:
        table: of sketches of hidden units. where: they come from.
    """
    shown, found = joined(parts), set[Pair]()
    for left, right in table.like(shown.vectors, SAME):
        unit, copy = where[left], shown.where[right]
        in_part = truth.partially_hidden[unit[:, 0]]
        itself = (unit[:, :2] == copy[:, :2]).all(axis=1) & ((unit[:, 2] == copy[:, 2]) | in_part)
        for one, other in _first_pairs(unit[~itself], copy[~itself]):
            pair = int(one[0]), int(other[0])
            if pair not in found and cosine(truth.vector(*one), truth.vector(*other)) > SAME:
                found.add(pair)
    return found


def _first_pairs(unit: Array, copy: Array) -> Iterator[tuple[Array, Array]]:
    """The first few pairs of vectors of each pair of tensors."""
    seen: dict[tuple[int, int], int] = {}
    for one, other in zip(unit, copy, strict=True):
        pair = int(one[0]), int(other[0])
        seen[pair] = seen.get(pair, 0) + 1
        if seen[pair] <= _COMPARISONS // 4:
            yield one, other


def _in_tensor(truth: TruthIndex, proxy: OpenedProxy, number: int, name: str) -> Iterator[Finding]:
    """Hidden units of the truth in a tensor of a proxy that is not as an export makes it."""
    task, transposed = truth.tasks[number], proxy.is_transposed(name)
    if not task.tensor.is_float or not proxy.tensors[name].is_float:
        return
    lead, rows, cols = task.layout.view
    view = matrix_view((lead, cols, rows) if transposed else (lead, rows, cols))
    layout = TensorLayout("raw", "flat", transposed, view, None)

    def read(first: int, rows: int, columns: slice) -> Floats:
        return np.ascontiguousarray(proxy.values(name, layout, first, rows)[:, columns])

    def vector(kind: int, index: int) -> Floats:
        return fetch(read, view, kind, index)

    matrix = MatrixSketches(view)
    for first, count in row_chunks(replace(layout, transposed=False), 1, CHUNK_ELEMENTS):
        matrix.take(first, read(first, count, slice(None)))
    found = matrix.by_length(0)
    hits = sum(_confirm(truth, length, sketches, vector, number, transposed) for length, sketches in found.items())
    if hits:
        message = "holds units of the truth that are hidden (at least so many)"
        yield HIDDEN_UNIT_PRESENT.finding(proxy.scope, message, tensor=name, value=float(hits), limit=0.0)


def _confirm(
    truth: TruthIndex,
    length: int,
    candidates: Sketches,
    vector: Callable[[int, int], Floats],
    number: int,
    transposed: bool,
) -> int:
    """How many of the candidates in a tensor of the model are copies of hidden units, number by number.

    Args:
        vector: reads a candidate: (0 a row or 1 a column, index). number: of the tensor in the truth.
    """
    if length < SHORTEST or length not in truth.lengths():
        return 0
    _, origin, hidden = truth.stacked(length)
    # what is left of a vector when some of its numbers are hidden is still like it
    wanted = hidden & ~((origin[:, 0] == number) & truth.partially_hidden[number])
    confirmed = 0

    def read(place: Array) -> Floats:
        return vector(int(place[1]), int(place[2]))

    for unit, place, near in _copies(truth, length, candidates, wanted, read, 4 * _COMPARISONS):
        own = (number, 1 - int(place[1]) if transposed else int(place[1]), int(place[2]))
        if tuple(origin[unit]) == own or near > cosine(read(place), truth.vector(*own)) + 1e-3:
            confirmed += 1
            wanted[unit] = False
        if confirmed == _COMPARISONS:
            break
    return confirmed


def _copies(
    truth: TruthIndex, length: int, candidates: Sketches, wanted: Array, read: Callable[[Array], Floats], most: int
) -> Iterator[tuple[int, Array, float]]:
    """Copies of vectors of the truth: (number of the vector, where the copy is, |cosine|).

    Args:
        candidates: vectors of that length, sketched; `read` gives their numbers.
        wanted: flags of the vectors that are looked for; those of which enough is known may be cleared meanwhile.
        most: comparisons number by number.
    """
    (sketches, origin, _), (vectors, places) = truth.stacked(length), candidates
    units, comparisons = np.flatnonzero(wanted), 0
    known = sketches if wanted.all() else sketches[units]
    pairs = (pair for table in hash_tables(known, len(vectors)) for pair in table.like(vectors))
    for left, right in pairs:
        for unit, place in zip(units[left], places[right], strict=True):
            if comparisons == most:
                return
            if not wanted[unit]:
                continue
            comparisons += 1
            near = cosine(read(place), truth.vector(*origin[unit]))
            partial = truth.partially_hidden[origin[unit][0]]
            if near > (SHORT_COPY if length < _SHORT else SAME if partial else COPY):
                yield int(unit), place, near


def _unexpected(truth: TruthIndex, proxy: OpenedProxy) -> Iterator[tuple[str, ReadBytes, int]]:
    """Content that a proxy does not consist of: (what to call it, how to read bytes of it, how many there are)."""
    expected = {task.name for task in truth.tasks}
    companions = {name for tensor in proxy.tensors.values() if tensor.packing for name in tensor.packing.companions}
    for checkpoint, known in (
        (proxy.checkpoint, expected | companions),
        (proxy.units.stored, set(proxy.manifest.groups)),
    ):
        for name, entry in checkpoint.entries.items():
            if name not in known:
                yield name, _reader(entry.file, entry.start), entry.nbytes
    own = {entry.file for entry in (*proxy.checkpoint.entries.values(), *proxy.units.stored.entries.values())}
    for path in files_of(proxy.folder):
        listed = path in own or path.name in {PROXY_MANIFEST, VISIBLE_TENSORS, "config.json"}
        if not listed and not is_oversized(path):
            yield path.name, _reader(path), path.stat().st_size


def _reader(path: Path, start: int = 0) -> ReadBytes:
    """Reads a file from a place on."""

    def read(begin: int, count: int) -> bytes:
        with open(open_regular_file(path), "rb") as file:
            file.seek(start + begin)
            return file.read(count)

    return read


def _in_bytes(truth: TruthIndex, proxy: OpenedProxy, label: str, read: ReadBytes, size: int) -> list[Finding]:
    """Units of the truth in bytes of unknown meaning: as fp32, fp16, bf16 and int8, as rows and as columns."""
    start, worst = _after_header(read, size) if label.endswith(".safetensors") else 0, _NOTHING
    name = label if label.isprintable() and len(label) <= 200 else None
    for length in truth.lengths():
        for dtype in ("F32", "F16", "BF16", "I8") if length >= SHORTEST else ():
            for x in _vectors(read, start, size, length, dtype):
                worst = _similarity_level(truth, length, x, worst)
                if worst == _HIDDEN:
                    message = "holds units of the truth that are hidden"
                    return [HIDDEN_UNIT_PRESENT.finding(proxy.scope, message, tensor=name)]
    message = "holds weights of the truth once more"
    return [CLEAR_COPY.finding(proxy.scope, message, tensor=name)] if worst else []


def _after_header(read: ReadBytes, size: int) -> int:
    """Where the data of a safetensors file begins."""
    length = int.from_bytes(read(0, min(8, size)), "little")
    return 8 + length if 8 + length <= size else 0


def _vectors(read: ReadBytes, start: int, size: int, length: int, dtype: str) -> Iterator[Floats]:
    """Bytes as vectors, [n, length], a run at a time: stored one after the other, or across."""
    width = length * DTYPES[dtype].nbytes
    count, step = (size - start) // width, max(1, _READ // width)
    for first in range(0, count, step):
        yield _numbers(read(start + first * width, min(step, count - first) * width), dtype).reshape(-1, length)
    if (size - start) % width == 0 and size - start <= 64 * _READ and count > 1:
        across = _numbers(read(start, size - start), dtype).reshape(length, count).T
        for first in range(0, count, step):
            yield np.ascontiguousarray(across[first : first + step])


def _numbers(data: bytes, dtype: str) -> Floats:
    """Bytes as numbers of a dtype; what is not finite counts as zero."""
    if dtype == "I8":
        return np.frombuffer(data, np.int8).astype(np.float32)
    x = kernels.widened(np.frombuffer(bytearray(data), DTYPES[dtype].bits), dtype)
    return np.where(np.isfinite(x) & (np.abs(x) < 1e15), x, np.float32(0))


def _similarity_level(truth: TruthIndex, length: int, x: Floats, known: int) -> int:
    """The worst that rows x, [n, length], are copies of, or what is known if that is worse."""
    low, high = window(length)
    candidates = Sketches.of(of_rows(x, "F32"), high - low, origins(0, 0, 0, len(x)))
    hidden = truth.stacked(length).hidden
    wanted = hidden.copy() if known == _SHOWN else np.ones_like(hidden)
    for unit, _, _ in _copies(truth, length, candidates, wanted, lambda place: x[place[2]], 8 * _COMPARISONS):
        if hidden[unit]:
            return _HIDDEN
        known, wanted[:] = _SHOWN, hidden
    return known
