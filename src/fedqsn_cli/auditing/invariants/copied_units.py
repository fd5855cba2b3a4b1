"""FQ002 and FQ007 over whole models: sketch the truth once, then look for its hidden units where they may not be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.artifacts.manifests import PROXY_MANIFEST, VISIBLE_TENSORS
from fedqsn_cli.auditing.findings import Finding
from fedqsn_cli.auditing.inputs import Inputs, OpenedProxy, Report
from fedqsn_cli.auditing.invariants.sketches import SHORTEST, Sketches, add_vectors, cosine, similar, window
from fedqsn_cli.auditing.rows import plain
from fedqsn_cli.auditing.rules import finding
from fedqsn_cli.checkpoint import Checkpoint
from fedqsn_cli.errors import FedqsnError
from fedqsn_cli.export.pipeline import CHUNK_ELEMENTS
from fedqsn_cli.masks.job_masks import ServerMasks
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.models.tensor_task import TensorTask, tensor_tasks
from fedqsn_cli.quantization.layout import TensorLayout

Array = NDArray[Any]
Floats = NDArray[np.float32]
Read = Callable[[int, int, slice], Floats]
"""(first row, rows, columns) -> fp32 [rows, columns]."""

TWIN, COPY, SHORT_COPY = 0.9999, 0.98, 1 - 1e-6  # cosines; see search.py
_SHORT = 16  # numbers; below, unrelated vectors may be alike by chance
_LOOKS = 16  # pairs a tensor that are compared number by number
_READ = 1 << 22  # bytes of unexpected content at a time


@dataclass
class Truth:
    """The sketched truth: all rows and columns by length, and which of them are hidden."""

    model: OpenModel
    tasks: list[TensorTask]
    book: dict[int, Sketches] = field(default_factory=dict)
    _joined: dict[int, tuple[Floats, Array, Array]] = field(default_factory=dict)

    def lengths(self) -> list[int]:
        """Lengths of which there is a hidden vector."""
        return [length for length in sorted(self.book) if self.joined(length)[2].any()]

    def joined(self, length: int) -> tuple[Floats, Array, Array]:
        """Sketches of one length, where they come from [n, 3], and whether each is (in part) hidden [n]."""
        if length not in self._joined:
            vectors, where = self.book.get(length, Sketches()).joined()
            self._joined[length] = vectors, where, self._hidden(where)
        return self._joined[length]

    def _hidden(self, where: Array) -> Array:
        hidden = np.zeros(len(where), np.bool_)
        for number in np.unique(where[:, 0]):
            task = self.tasks[number]
            if task.hidden is None:
                continue
            chosen = np.flatnonzero(where[:, 0] == number)
            kinds, index = where[chosen, 1], where[chosen, 2]
            rows, columns = hidden_vectors(task.hidden)
            hidden[chosen] = np.where(
                kinds == 0, rows[index % max(1, len(rows))], columns[index % max(1, len(columns))]
            )
        return hidden

    def is_loose(self, number: int) -> bool:
        """Is a vector of this tensor hidden in part only (single weights as units, biases)?"""
        hidden = self.tasks[number].hidden
        return hidden is not None and (hidden.axis == "element" or hidden.view[2] == 1)

    def reader(self, number: int) -> Read:
        """Reads rows of a tensor of the truth."""
        task = self.tasks[number]
        raw = TensorLayout("raw", "flat", False, matrix_view(task.layout.view), None)
        as_stored = TensorTask(task.plan, task.tensor, raw, None)

        def read(first: int, rows: int, columns: slice) -> Floats:
            x = self.model.read_rows(task.name, raw, first, rows)[:, columns]
            return np.asarray(plain(as_stored, np.ascontiguousarray(x)))

        return read

    def vector(self, number: int, kind: int, index: int) -> Floats:
        """A row or a column of a tensor of the truth."""
        return fetch(self.reader(number), matrix_view(self.tasks[number].layout.view), kind, index)


def matrix_view(view: tuple[int, int, int]) -> tuple[int, int, int]:
    """A bias, [n, 1] as units see it, is one row."""
    lead, rows, cols = view
    return (1, lead, rows) if cols == 1 else view


def hidden_vectors(mask: UnitMask) -> tuple[Array, Array]:
    """Flags of rows [lead * rows] and of columns [lead * cols] of the matrix view: hidden, or hidden in part."""
    lead, rows, cols = mask.view
    if cols == 1:
        return np.asarray(mask.flags.reshape(lead, rows).any(axis=1)), np.zeros(rows * lead, np.bool_)
    if mask.axis == "row":
        return mask.flags, np.zeros(lead * cols, np.bool_)
    if mask.axis == "column":
        return np.zeros(lead * rows, np.bool_), mask.flags.reshape(-1)
    return np.asarray(mask.flags.reshape(lead * rows, cols).any(axis=1)), np.zeros(lead * cols, np.bool_)


def fetch(read: Read, view: tuple[int, int, int], kind: int, index: int) -> Floats:
    """A row or a column, read by runs of rows."""
    _, rows, cols = view
    if kind == 0:
        return read(index, 1, slice(None)).reshape(-1)
    begin, column = index // cols * rows, index % cols
    step = max(1, CHUNK_ELEMENTS // cols)
    one = slice(column, column + 1)
    parts = [read(first, min(step, begin + rows - first), one) for first in range(begin, begin + rows, step)]
    return np.concatenate(parts).reshape(-1)


def sketch(book: dict[int, Sketches], number: int, view: tuple[int, int, int], read: Read) -> None:
    """Sketch all rows and columns of one tensor, slice by slice."""
    lead, rows, cols = view
    if rows * cols == 0:
        return
    step = max(1, CHUNK_ELEMENTS // 2 // cols)
    for part in range(lead):
        for first in range(part * rows, (part + 1) * rows, step):
            count = min(step, (part + 1) * rows - first)
            add_vectors(book, cols, read(first, count, slice(*window(cols))), _places(number, 0, first, count))
        if rows >= SHORTEST:
            low, high = window(rows)
            across = np.ascontiguousarray(read(part * rows + low, high - low, slice(None)).T)
            add_vectors(book, rows, across, _places(number, 1, part * cols, cols))


def _places(number: int, kind: int, first: int, count: int) -> Array:
    """Where vectors come from: [count, 3]."""
    return np.stack([np.full(count, number), np.full(count, kind), np.arange(first, first + count)], axis=1)


def sketch_truth(inputs: Inputs) -> Truth:
    """Read the truth once and sketch it."""
    assert inputs.truth is not None
    truth = Truth(inputs.truth, tensor_tasks(inputs.truth, None, lambda tensor: hidden_of(inputs, tensor)))
    for number, task in enumerate(truth.tasks):
        if task.tensor.is_float:
            sketch(truth.book, number, matrix_view(task.layout.view), truth.reader(number))
    return truth


def hidden_of(inputs: Inputs, tensor: Any) -> UnitMask | None:
    """What the server hides of a tensor; without the key, what none of the proxies shows."""
    if inputs.job is not None:
        return ServerMasks(inputs.job).hidden(tensor)
    masks = [proxy.visible(tensor.name) for proxy in inputs.proxies]
    known = [mask for mask in masks if mask is not None]
    if not known:
        return None
    marks = ~np.logical_or.reduce([mask.flags for mask in known])
    return UnitMask(known[0].axis, known[0].view, marks) if marks.any() else None


def check_presence(inputs: Inputs, report: Report, odd: Mapping[str, set[str]]) -> None:
    """FQ002 and FQ007 for the truth's own twins and for every proxy."""
    if inputs.truth is None:
        for proxy in inputs.proxies:
            report.skip("FQ002", proxy.scope, "needs --truth, to look for its hidden units everywhere")
        return
    truth = sketch_truth(inputs)
    known = "that the key hides" if inputs.job else "that no given proxy shows (no --key)"
    why = f"rows and columns of all tensors were compared with the units {known}"
    report.add("FQ002", "truth", why, list(_twins(truth)))
    for proxy in inputs.proxies:
        names = odd.get(proxy.scope, set(proxy.tensors)) & {task.name for task in truth.tasks} & set(proxy.tensors)
        found: list[Finding] = []
        try:
            for name in sorted(names):
                found += _in_tensor(truth, proxy, name)
            for label, read, size in _unexpected(truth, proxy):
                found += _in_bytes(truth, proxy, label, read, size)
        except FedqsnError as error:
            report.findings.append(finding("FQ903", proxy.scope, f"cannot be searched: {error.what}"))
            continue
        report.add("FQ002", proxy.scope, why, found)


def _twins(truth: Truth) -> Iterator[Finding]:
    """Hidden units that the truth holds once more where they are shown."""
    reported: set[tuple[int, int]] = set()
    loose = np.array([truth.is_loose(number) for number in range(len(truth.tasks))])
    for length in truth.lengths():
        vectors, where, hidden = truth.joined(length)
        units, shown = np.flatnonzero(hidden), np.flatnonzero(~hidden | loose[where[:, 0]])
        if length < _SHORT:
            continue
        for left, right in similar(vectors[units], vectors[shown], TWIN, tables=3):
            unit, copy = where[units[left]], where[shown[right]]
            itself = (unit[:, :2] == copy[:, :2]).all(axis=1) & ((unit[:, 2] == copy[:, 2]) | loose[unit[:, 0]])
            for one, other in _first_pairs(unit[~itself], copy[~itself]):
                pair = int(one[0]), int(other[0])
                if pair not in reported and cosine(truth.vector(*one), truth.vector(*other)) > TWIN:
                    reported.add(pair)
                    message = f"units that are hidden here are shown as part of {truth.tasks[pair[1]].name}"
                    yield finding("FQ002", "truth", message, tensor=truth.tasks[pair[0]].name)


def _first_pairs(unit: Array, copy: Array) -> Iterator[tuple[Array, Array]]:
    """The first few pairs of vectors of each pair of tensors."""
    seen: dict[tuple[int, int], int] = {}
    for one, other in zip(unit, copy, strict=True):
        pair = int(one[0]), int(other[0])
        seen[pair] = seen.get(pair, 0) + 1
        if seen[pair] <= _LOOKS // 4:
            yield one, other


def _in_tensor(truth: Truth, proxy: OpenedProxy, name: str) -> list[Finding]:
    """Hidden units of the truth in a tensor of a proxy that is not as an export makes it."""
    number = next(index for index, task in enumerate(truth.tasks) if task.name == name)
    task = truth.tasks[number]
    if not task.tensor.is_float or not proxy.tensors[name].is_float:
        return []
    if proxy.turned(name):
        lead, rows, cols = task.layout.view
        storage = TensorLayout("raw", "flat", True, (lead, cols, rows), None)
    else:
        storage = TensorLayout("raw", "flat", False, task.layout.view, None)
    view = matrix_view(storage.view)

    def read(first: int, rows: int, columns: slice) -> Floats:
        plain_view = TensorLayout("raw", "flat", storage.transposed, view, None)
        return np.ascontiguousarray(proxy.values(name, plain_view, first, rows)[:, columns])

    book: dict[int, Sketches] = {}
    sketch(book, 0, view, read)
    hits = 0
    for length, sketches in book.items():
        vectors, where = sketches.joined()
        hits += _confirm(
            truth,
            length,
            vectors,
            where,
            lambda kind, index: fetch(read, view, kind, index),
            number,
            storage.transposed,
        )
    if not hits:
        return []
    message = "holds units of the truth that are hidden (at least so many)"
    return [finding("FQ002", proxy.scope, message, tensor=name, value=float(hits), limit=0.0)]


def _confirm(
    truth: Truth,
    length: int,
    vectors: Floats,
    where: Array,
    read: Callable[[int, int], Floats],
    number: int,
    turned: bool,
) -> int:
    """How many of the candidates in a tensor of the model are copies of hidden units, number by number."""
    if length < SHORTEST or length not in truth.lengths():
        return 0
    sketches, origin, hidden = truth.joined(length)
    units = np.flatnonzero(hidden)
    confirmed: set[tuple[int, ...]] = set()
    looks = 0
    for left, right in similar(sketches[units], vectors):
        for unit, place in zip(origin[units[left]], where[right], strict=True):
            kind, index = int(place[1]), int(place[2])
            own = (number, 1 - kind if turned else kind, index)
            if looks >= 4 * _LOOKS or len(confirmed) >= _LOOKS:
                return len(confirmed)
            if tuple(unit) in confirmed:
                continue
            loose = truth.is_loose(int(unit[0]))
            if loose and unit[0] == number:
                continue  # what is left of the vector when some of its numbers are hidden is still like it
            looks += 1
            found = read(kind, index)
            near = cosine(found, truth.vector(*unit))
            least = SHORT_COPY if length < _SHORT else TWIN if loose else COPY
            if near > least and (tuple(unit) == own or near > cosine(found, truth.vector(*own)) + 1e-3):
                confirmed.add(tuple(unit))
    return len(confirmed)


Reader = Callable[[int, int], bytes]


def _unexpected(truth: Truth, proxy: OpenedProxy) -> Iterator[tuple[str, Reader, int]]:
    """Content that a proxy does not consist of: (what to call it, how to read bytes of it, how many there are)."""
    expected = {task.name for task in truth.tasks}
    companions = {name for one in proxy.tensors.values() if one.packing for name in one.packing.companions}
    for checkpoint, known in (
        (proxy.checkpoint, expected | companions),
        (proxy.units.stored, set(proxy.manifest.groups)),
    ):
        for name, entry in checkpoint.entries.items():
            if name not in known:
                yield name, _entry_reader(checkpoint, name), entry.nbytes
    own = {entry.file for entry in (*proxy.checkpoint.entries.values(), *proxy.units.stored.entries.values())}
    for path in sorted(proxy.folder.rglob("*")):
        if path.is_file() and path not in own and path.name not in {PROXY_MANIFEST, VISIBLE_TENSORS, "config.json"}:
            yield path.name, _file_reader(path), path.stat().st_size


def _entry_reader(checkpoint: Checkpoint, name: str) -> Reader:
    def read(start: int, count: int) -> bytes:
        out = np.empty(count, np.uint8)
        checkpoint.read_into(name, start, out)
        return out.tobytes()

    return read


def _file_reader(path: Path) -> Reader:
    def read(start: int, count: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(count)

    return read


def _in_bytes(truth: Truth, proxy: OpenedProxy, label: str, read: Reader, size: int) -> list[Finding]:
    """Units of the truth in bytes of unknown meaning: as fp32, fp16, bf16 and int8, as rows and as columns."""
    data_start = _after_header(read, size) if label.endswith(".safetensors") else 0
    worst = 0
    for length in truth.lengths():
        for kind, itemsize in (("F32", 4), ("F16", 2), ("BF16", 2), ("I8", 1)):
            worst = max(worst, _as_rows(truth, length, kind, itemsize, read, data_start, size))
            if worst == 2:
                return [_named_copy(proxy, label, "FQ002", "holds units of the truth that are hidden")]
    return [_named_copy(proxy, label, "FQ007", "holds weights of the truth once more")] if worst else []


def _named_copy(proxy: OpenedProxy, label: str, rule: str, message: str) -> Finding:
    return finding(rule, proxy.scope, message, tensor=label if label.isprintable() and len(label) <= 200 else None)


def _after_header(read: Reader, size: int) -> int:
    """Where the data of a safetensors file begins."""
    length = int.from_bytes(read(0, min(8, size)), "little")
    return 8 + length if 8 + length <= size else 0


def _as_rows(truth: Truth, length: int, kind: str, itemsize: int, read: Reader, start: int, size: int) -> int:
    """2: a hidden unit is there, 1: another unit of the truth, 0: none; vectors lie one after the other, or across."""
    width = length * itemsize
    count = (size - start) // width
    if not count or length < SHORTEST:
        return 0
    worst = 0
    step = max(1, _READ // width)
    for first in range(0, count, step):
        data = read(start + first * width, min(step, count - first) * width)
        worst = max(worst, _alike(truth, length, _numbers(data, kind).reshape(-1, length)))
    if (size - start) % width == 0 and size - start <= 64 * _READ and count > 1 and worst < 2:
        whole = _numbers(read(start, size - start), kind).reshape(length, count)
        for column in range(0, count, step):
            worst = max(worst, _alike(truth, length, np.ascontiguousarray(whole[:, column : column + step].T)))
    return worst


def _numbers(data: bytes, kind: str) -> Floats:
    """Bytes as numbers of a dtype; what is not finite counts as zero."""
    if kind == "I8":
        return np.frombuffer(data, np.int8).astype(np.float32)
    if kind == "BF16":
        x = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        x = np.frombuffer(data, np.float16 if kind == "F16" else np.float32).astype(np.float32)
    return np.where(np.isfinite(x) & (np.abs(x) < 1e15), x, np.float32(0))


def _alike(truth: Truth, length: int, x: Floats) -> int:
    """The worst that rows x, [n, length], are: as `_as_rows`."""
    sketches, origin, hidden = truth.joined(length)
    book: dict[int, Sketches] = {}
    add_vectors(book, length, np.ascontiguousarray(x[:, slice(*window(length))]), _places(0, 0, 0, len(x)))
    vectors, places = book.get(length, Sketches()).joined()
    worst = looks = 0
    for left, right in similar(sketches, vectors):
        for unit, place in zip(left, right, strict=True):
            level = 2 if hidden[unit] else 1
            if looks >= 8 * _LOOKS or worst == 2:
                return worst
            if level <= worst:
                continue
            looks += 1
            loose = truth.is_loose(int(origin[unit][0]))
            least = SHORT_COPY if length < _SHORT else TWIN if loose else COPY
            if cosine(x[places[place][2]], truth.vector(*origin[unit])) > least:
                worst = level
    return worst
