"""The figures about adapters: training them, sending them, merging them.

lora measures all of training and sending; lora-step, lora-start and lora-bytes each a part, for machines that are free
for some minutes only.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.inputs import Place
from benchmarks.lora import BATCH, RANK
from benchmarks.measure import Contender, Sample, compare, run, said_by, step_seconds, total_bytes
from benchmarks.report import Row
from benchmarks.synthetic import SHAPES

STEPS = 6
PEER = "peft + transformers + bitsandbytes"


def lora(place: Place, size: str) -> Iterator[Row]:
    """All that is measured about training adapters on an nf4 proxy."""
    yield from lora_step(place, size)
    yield from lora_start(place, size)
    yield from lora_bytes(place, size)


def lora_step(place: Place, size: str) -> Iterator[Row]:
    """Time of a step, peak memory and start against a plain loop."""
    folder = place.adapters(size)
    ours, theirs, start, theirs_start = Sample(), Sample(), Sample(), Sample()
    for _ in range(place.runs):
        place.clear("update", "ours.jsonl", "plain.jsonl")
        began = time.time()
        _, processor, peak = run(_client_train(place, folder, STEPS))
        step, first = step_seconds(place.work / "ours.jsonl", began)
        ours.add(step, processor / STEPS, peak)
        start.add(first, 0.0, 0.0)
        words = "plain", folder / "proxy", folder / "data.jsonl", place.work / "plain.jsonl", BATCH, STEPS
        began = time.time()
        _, processor, peak = run(place.module("benchmarks.lora", *words))
        step, first = step_seconds(place.work / "plain.jsonl", began)
        theirs.add(step, processor / STEPS, peak)
        theirs_start.add(first, 0.0, 0.0)
    yield Row.of(f"LoRA step, {size} nf4", size, ours, PEER, theirs, most=1.05)
    ratio = ours.largest / theirs.largest
    note = f"{ours.largest:.0f} against {theirs.largest:.0f} MiB"
    yield Row.of(f"peak of LoRA training, {size} nf4", size, ours, PEER, theirs, ratio, 1.0, note)
    yield Row.of(f"start to the first LoRA step, {size} nf4", size, start, PEER, theirs_start, most=1.0)
    place.clear("update", "ours.jsonl", "plain.jsonl")


def lora_start(place: Place, size: str) -> Iterator[Row]:
    """Start to the end of the first step against from_pretrained alone."""
    folder = place.adapters(size)
    start, loading = Sample(), Sample()
    for _ in range(place.runs):
        place.clear("update", "ours.jsonl")
        began = time.time()
        _, processor, peak = run(_client_train(place, folder, 2))
        start.add(step_seconds(place.work / "ours.jsonl", began)[1], processor, peak)
        loading.add(*run(place.module("benchmarks.lora", "load", folder / "proxy")))
    yield Row.of(f"start to the first LoRA step, {size} nf4", size, start, "from_pretrained alone", loading)
    place.clear("update", "ours.jsonl")


def lora_bytes(place: Place, size: str) -> Iterator[Row]:
    """Bytes to send back against a full update."""
    folder = place.adapters(size)
    place.clear("update", "ours.jsonl")
    run(_client_train(place, folder, 1))
    sent = total_bytes(place.work / "update")
    whole = int(said_by(place.module("benchmarks.lora", "full", folder / "proxy")))
    figure = f"bytes of an update, LoRA r = {RANK}, {size}"
    ratio, note = sent / whole, f"{sent / 1e6:.1f} against {whole / 1e6:.0f} MB"
    yield Row(figure, size, None, "full, fp32", None, ratio, "<= 0.01x", ratio <= 0.01, note)
    place.clear("update", "ours.jsonl")


def merge_lora(place: Place, size: str) -> Iterator[Row]:
    """A merge of adapters against reading the model and the updates, and writing the model."""
    place.model(size)
    job = place.adapter_job(size, place.updates)
    inputs = [job.model, *job.updates]
    out = 4 * SHAPES[size].parameters  # the model and what rounding drops
    place.need(2 * out)

    def fresh() -> None:
        place.clear("merged", "floor.bin")

    floor = place.module("benchmarks.floor", "plain", out, place.work / "floor.bin", *inputs)
    samples = compare(
        {
            "ours": Contender(place.merge(job, "merged"), inputs, fresh, fresh),
            "plain": Contender(floor, inputs, fresh, fresh),
        },
        place.runs,
    )
    ours, plain = samples["ours"], samples["plain"]
    figure = f"merge of {place.updates} LoRA updates r = {RANK}, {size}"
    yield Row.of(figure, size, ours, "floor: plain loops", plain, most=1.3, note=f"peak {ours.largest:.0f} MiB")


def _client_train(place: Place, folder: Path, steps: int) -> list[str]:
    return place.fedqsn(
        *("client-train", folder / "proxy", "--out", place.work / "update", "--data", folder / "data.jsonl"),
        *("--method", "lora", "--lora-r", RANK, "--batch-size", BATCH, "--max-steps", steps),
        *("--device", "cpu", "--log", place.work / "ours.jsonl"),  # like its peer it computes in the dtype of the proxy
    )
