"""Much of everything: many exports at once, tensors, shards, releases and clients, and tensors over 4 GiB.

The models for it and a long ledger are made by processes of their own:

    python -m benchmarks.load model LAYERS SHARD_BYTES FOLDER
    python -m benchmarks.load wide ELEMENTS FOLDER
    python -m benchmarks.load ledger KEY LEDGER RELEASES
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.inputs import P1, P2, Place
from benchmarks.measure import run, watch
from benchmarks.report import Row
from benchmarks.synthetic import SHAPES, SHARD_BYTES, Shape, write

EXPORTS, TENSORS, SHARDS, RELEASES, CLIENTS = 64, 10_000, 200, 100_000, 1000
OPEN_FILES = 1024  # what most systems allow a process
ELEMENTS = 2_200_000_000  # of a tensor: more than 2^31, and 4.1 GiB
A_LAYER = 9  # tensors
KEY, LEDGER = "load.key", "load.jsonl"


def load(place: Place, size: str) -> Iterator[Row]:
    """All of them; `Place.load` is the share of the full load."""
    yield from exports_at_once(place, _share(place, EXPORTS))
    yield from large_model(place, max(1, _share(place, TENSORS) // A_LAYER), SHARD_BYTES)
    yield from large_model(place, max(1, _share(place, SHARDS) // A_LAYER), 1)
    yield from long_ledger(place, _share(place, RELEASES))
    yield from many_clients(place, _share(place, CLIENTS))
    yield from large_tensors(place, _share(place, ELEMENTS))


def exports_at_once(place: Place, count: int) -> Iterator[Row]:
    """Processes that all export their proxy at the same time, on one key and one ledger."""
    model = place.model("tiny")
    _clear(place)
    run(_export(place, model, "first"))
    commands = [_export(place, model, f"c{number}") for number in range(count)]
    sample, files = watch(commands)
    lines = (place.work / LEDGER).read_bytes().count(b"\n")
    yield Row.load(f"{count} exports at once", sample, files, f"{lines} of {count + 1} releases in the ledger")


def large_model(place: Place, layers: int, shard_bytes: int) -> Iterator[Row]:
    """An export of a model of many tensors, in one file or with each in a file of its own."""
    _clear(place)
    model = place.work / "load-model"
    run(place.module("benchmarks.load", "model", layers, shard_bytes, model))
    sample, files = watch([_export(place, model, "a")])
    tensors = sum(1 for _ in _deep(layers).tensors())
    shards = len(list(model.glob("*.safetensors")))
    yield Row.load(f"export of {tensors} tensors in {shards} files", sample, files)


def long_ledger(place: Place, count: int) -> Iterator[Row]:
    """An export whose ledger holds many releases of the job."""
    model = place.model("tiny")
    _clear(place)
    run(_export(place, model, "first"))
    run(place.module("benchmarks.load", "ledger", *_secrets(place), count))
    sample, files = watch([_export(place, model, "last")])
    yield Row.load(f"export with {count} earlier releases", sample, files)


def many_clients(place: Place, count: int) -> Iterator[Row]:
    """One round of many clients, whose updates are random, under the usual limit of open files."""
    size = "0.005b" if place.load >= 1 else "tiny"
    model = place.model(size)
    place.need(3 * count * SHAPES[size].parameters)
    _clear(place)
    limited = ["prlimit", f"--nofile={OPEN_FILES}"]
    sample, files = watch([limited + _export(place, model, *(f"c{number}" for number in range(count)))])
    yield Row.load(f"export for {count} clients ({size})", sample, files)
    yield _merge(place, model, f"merge of {count} updates ({size})")


def large_tensors(place: Place, elements: int) -> Iterator[Row]:
    """One round of one client with a model whose embedding and head have so many elements each."""
    place.need(17 * elements)  # the model, the proxy, an update, and the next model with its residual
    _clear(place)
    model = place.work / "load-model"
    run(place.module("benchmarks.load", "wide", elements, model))
    sample, files = watch([_export(place, model, "a")])
    yield Row.load(f"export of two tensors of {elements} elements", sample, files)
    yield _merge(place, model, f"merge of two tensors of {elements} elements")


def _merge(place: Place, model: Path, what: str) -> Row:
    """Merge random updates of all clients in the ledger."""
    key, ledger = _secrets(place)
    folder = place.work / "load-updates"
    run(place.module("benchmarks.updates", model, key, ledger, place.update_format, folder))
    words = ["merge", model, *sorted(folder.iterdir()), "--out", place.work / "load-merged"]
    place.clear("load-out")  # the proxies are as large as a quarter of the updates
    limited = ["prlimit", f"--nofile={OPEN_FILES}"]
    sample, files = watch([limited + place.fedqsn(*words, "--key", key, "--ledger", ledger)])
    _clear(place)
    return Row.load(what, sample, files)


def _share(place: Place, count: int) -> int:
    return max(2, round(place.load * count))


def _clear(place: Place) -> None:
    place.clear(KEY, LEDGER, f"{LEDGER}.head", "load-model", "load-out", "load-updates", "load-merged")


def _secrets(place: Place) -> tuple[Path, Path]:
    return place.work / KEY, place.work / LEDGER


def _export(place: Place, model: Path, *clients: str) -> list[str]:
    named = [word for client in clients for word in ("--client", client)]
    key, ledger = _secrets(place)
    where = ["--out", place.work / "load-out/{client}", "--key", key, "--ledger", ledger]
    return place.fedqsn("export-proxy", model, *named, *where, "--round", 1, "--p1", P1, "--p2", P2)


def _deep(layers: int) -> Shape:
    """A model of many small layers."""
    return Shape(16, layers, 2, 2, 32, 128)


def _fill(key: Path, path: Path, count: int) -> None:
    """Record so many further releases like the first: a thousand clients, round after round."""
    from fedqsn_cli.artifacts import ledger
    from fedqsn_cli.masks import job_key

    job = job_key.load(key)
    first = ledger.read(path)[0]
    releases = []
    for number in range(count):
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        own = {"client": f"c{number % 1000}", "round": 2 + number // 1000, "proxy_id": digest, "proxy_sha256": digest}
        releases.append(first.model_copy(update=own))
    ledger.record(path, job, releases)


def main(arguments: list[str]) -> None:
    """Make a model or a long ledger."""
    what, *rest = arguments
    if what == "model":
        write(_deep(int(rest[0])), Path(rest[2]), 0, int(rest[1]))
    elif what == "wide":
        write(Shape(2048, 1, 16, 16, 256, int(rest[0]) // 2048), Path(rest[1]), 0)
    else:
        _fill(Path(rest[0]), Path(rest[1]), int(rest[2]))


if __name__ == "__main__":
    main(sys.argv[1:])
