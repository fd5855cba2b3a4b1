"""The figures, one function each. Each runs both sides of its comparison in turn, on the same files, in the same place.

kernel      nf4 codes in memory                 bitsandbytes quantize_4bit
floor       export-proxy                        plain loops that read and write as many bytes
peer        export-proxy                        transformers + bitsandbytes
fanout      export-proxy for 10 and 100         export-proxy for 1
merge       merge of 8 updates                  plain loops that read and write as many bytes
rules       merges that withstand attackers     a merge by average of the same updates
mergekit    merge of a model and 2 updates      mergekit-yaml, linear, 3 models
audit       audit of one proxy                  reading the model and the proxy once
memory      export-proxy and merge by size      600 MiB, and each other
help        fedqsn --help                       hf --help, a quarter of a second
exposure    of 1000 clients in 100 rounds       ten seconds
compile     the first command of all            the second one
training    steps of client-train               a plain loop of transformers and torch
lora        steps, start and bytes of LoRA      a plain loop of peft; from_pretrained; a full update (lora_figures.py)
            lora-step, lora-start and lora-bytes are parts of it
merge-lora  merge of 8 updates of adapters      plain loops that read and write as many bytes (lora_figures.py)
load        much of everything                  nothing: times, memory and open files (load.py)
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.inputs import Place
from benchmarks.load import load
from benchmarks.lora_figures import lora, lora_bytes, lora_start, lora_step, merge_lora
from benchmarks.measure import Contender, Sample, compare, run, said_by, step_seconds, total_bytes
from benchmarks.peers import install_mergekit, linear_merge
from benchmarks.report import Row
from benchmarks.synthetic import SHAPES
from benchmarks.training import KINDS

MAX_PEAK = 600.0  # MiB
MAX_HELP = 0.25  # seconds
MAX_EXPOSURE = 10.0  # seconds
MAX_START = 6.0  # seconds
TRAINED_STEPS = 8
RULES = {"median": 2, "trimmed-mean": 2, "krum": 2, "multi-krum": 2, "geometric-median": 2, "bulyan": 1}  # attackers


def kernel(place: Place, size: str) -> Iterator[Row]:
    """nf4 codes of numbers in memory; the size of the model does not matter."""
    for dtype in ("bf16", "fp32"):
        samples = {}
        for who in ("ours", "bitsandbytes"):
            arguments = "benchmarks.kernels", who, dtype, place.millions, place.runs
            seconds = json.loads(said_by(place.module(*arguments)))
            samples[who] = Sample(seconds, [0.0] * len(seconds), [0.0] * len(seconds))
        count = place.millions * 2**20
        speeds = {who: count / sample.median / 1e6 for who, sample in samples.items()}
        note = f"{speeds['ours']:.0f} against {speeds['bitsandbytes']:.0f} million parameters/s"
        yield Row.faster(f"nf4 kernel, {dtype}", "", samples["ours"], "bitsandbytes", samples["bitsandbytes"], 20, note)


def floor(place: Place, size: str) -> Iterator[Row]:
    """export-proxy against reading its input and writing its output."""
    model = place.model(size)
    out = _proxy_bytes(place, size)
    samples = compare(
        {
            "ours": _export(place, size, 1),
            "plain": _floor(place, "plain", out, [model]),
            "direct": _floor(place, "direct", out, [model]),
        },
        place.runs,
    )
    yield from _against_floors(f"export-proxy {size}", size, samples, total_bytes(model), out)


def peer(place: Place, size: str) -> Iterator[Row]:
    """export-proxy against what users of transformers do."""
    model = place.model(size)
    place.need(2 * total_bytes(model))
    theirs = Contender(
        place.module("benchmarks.peers", "quantize", model, place.work / "peer"),
        [model],
        lambda: place.clear("peer"),
        lambda: place.clear("peer"),
    )
    samples = compare({"ours": _export(place, size, 1), "theirs": theirs}, place.runs)
    note = f"peak {samples['ours'].largest:.0f} against {samples['theirs'].largest:.0f} MiB"
    yield Row.faster(
        f"export-proxy {size}", size, samples["ours"], "transformers + bitsandbytes", samples["theirs"], 10, note
    )


def fanout(place: Place, size: str) -> Iterator[Row]:
    """One call for several clients: each further proxy against the first."""
    place.model(size)
    out = _proxy_bytes(place, size)
    possible = [count for count in place.clients if count == 1 or _fits(place, count * out)]
    contenders = {str(count): _export(place, size, count) for count in possible}
    contenders["floor"] = _floor(place, "direct", out, [])
    samples = compare(contenders, place.runs)
    first = samples["1"].median
    for count in possible:
        if count == 1:
            continue
        sample = samples[str(count)]
        each = (sample.median - first) / (count - 1)
        note = f"{each:.2f} s each; the disk alone takes {samples['floor'].median:.2f} s for its {out / 1e6:.0f} MB"
        figure = f"each further proxy of {count}"
        yield Row.of(figure, size, sample, "the first", samples["1"], each / first, 0.35, note)
    for count in place.clients:
        if count not in possible:
            yield Row.skipped(f"each further proxy of {count}", size, f"the disk has no {count * out / 1e9:.0f} GB")


def merge(place: Place, size: str) -> Iterator[Row]:
    """A merge of updates against reading its input and writing its output."""
    place.model(size)
    job = place.job(size, place.updates, place.update_format)
    inputs = [job.model, *job.updates]
    out = 4 * SHAPES[size].parameters  # the model and what rounding drops
    place.need(2 * out)
    samples = compare(
        {
            "ours": _merge(place, job),
            "plain": _floor(place, "plain", out, inputs),
            "direct": _floor(place, "direct", out, inputs),
        },
        place.runs,
    )
    figure = f"merge of {place.updates} updates ({place.update_format}) {size}"
    yield from _against_floors(figure, size, samples, sum(map(total_bytes, inputs)), out)


def rules(place: Place, size: str) -> Iterator[Row]:
    """Rules that withstand attackers against the average of the same updates."""
    place.model(size)
    job = place.job(size, place.updates, place.update_format)
    place.need(8 * SHAPES[size].parameters)
    contenders = {"fedavg": _merge(place, job)}
    for rule, attackers in RULES.items():
        contenders[rule] = _merge(place, job, "--rule", rule, "--byzantine", attackers)
    samples = compare(contenders, place.runs)
    fedavg = samples.pop("fedavg")
    for rule, sample in samples.items():
        busy = [sum(each.processor) / len(each.processor) for each in (sample, fedavg)]
        note = f"{busy[0]:.1f} against {busy[1]:.1f} processor seconds, peak {sample.largest:.0f} MiB"
        figure = f"merge of {place.updates} by {rule} {size}"
        yield Row.of(figure, size, sample, "fedavg", fedavg, most=3.0, note=note)


def mergekit(place: Place, size: str) -> Iterator[Row]:
    """The average of three models against a merge of one model and two updates as large as it."""
    figure = f"merge of 3 times {size}"
    try:
        command = install_mergekit(place.work / "venv-mergekit")
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines() or ["pip failed"]
        yield Row.skipped(figure, size, f"mergekit cannot be installed: {lines[-1]}")
        return
    models = [place.model(size, copy) for copy in range(3)]
    job = place.job(size, 2, "bf16", "--p1", "0", "--p2", "0")
    place.need(3 * total_bytes(models[0]))
    recipe = place.work / "linear.yaml"
    recipe.write_text(linear_merge(models))
    theirs = Contender(
        [str(command), str(recipe), str(place.work / "merged")],
        models,
        lambda: place.clear("merged"),
        lambda: place.clear("merged"),
        {"HF_HUB_OFFLINE": "1"},
    )
    samples = compare({"ours": _merge(place, job), "theirs": theirs}, place.runs)
    note = f"peak {samples['ours'].largest:.0f} against {samples['theirs'].largest:.0f} MiB; ours writes twice as much"
    yield Row.faster(figure, size, samples["ours"], "mergekit-yaml linear", samples["theirs"], 4, note)
    place.clear(*(model.name for model in models[1:]))


def audit(place: Place, size: str) -> Iterator[Row]:
    """Invariants, reproduction and weights of one proxy against reading what they read, once; and peak memory."""
    job = place.audited(size)
    read = [job.model, job.proxy]
    owner = "--truth", job.model, "--key", job.key, "--ledger", job.ledger
    contenders = {
        "ours": Contender(place.fedqsn("audit", job.proxy, *owner), read),
        "reading": Contender(place.module("benchmarks.reading", *read), read),
    }
    samples = compare(contenders, place.runs)
    ours, reading = samples["ours"], samples["reading"]
    busy = [sum(sample.processor) / len(sample.processor) for sample in (ours, reading)]
    note = f"{sum(map(total_bytes, read)) / 1e9:.2f} GB; {busy[0]:.1f} against {busy[1]:.1f} processor seconds"
    yield Row.of(f"audit {size}", size, ours, "reading model and proxy once", reading, most=2.0, note=note)
    yield Row.peak("peak memory, audit", size, ours, MAX_PEAK)


def memory(place: Place, size: str) -> Iterator[Row]:
    """Peak resident memory of export and merge of one update, for one size; the report compares the sizes."""
    model = place.model(size)
    exported = compare({"ours": _export(place, size, 1)}, 1)["ours"]
    yield Row.peak("peak memory, export-proxy", size, exported, MAX_PEAK)
    place.need(3.3 * total_bytes(model))
    job = place.job(size, 1, "bf16")
    merged = compare({"ours": _merge(place, job)}, 1)["ours"]
    yield Row.peak("peak memory, merge", size, merged, MAX_PEAK)


def help_text(place: Place, size: str) -> Iterator[Row]:
    """How long the help takes to appear."""
    scripts = Path(place.python).parent
    ours = str(scripts / "fedqsn")
    command = [ours] if os.path.exists(ours) else [place.python, "-m", "fedqsn_cli"]
    samples = compare(
        {"ours": Contender([*command, "--help"]), "theirs": Contender([str(scripts / "hf"), "--help"])}, 5 * place.runs
    )
    ratio = samples["ours"].median / samples["theirs"].median
    yield Row.of("fedqsn --help", "", samples["ours"], "hf --help", samples["theirs"], ratio, 0.5)
    yield Row.within("fedqsn --help, alone", "", samples["ours"], MAX_HELP)


def exposure(place: Place, size: str) -> Iterator[Row]:
    """What a thousand clients have seen after a hundred rounds, from a ledger and a key in memory."""
    seconds = json.loads(said_by(place.module("benchmarks.exposure", place.runs)))
    nothing = [0.0] * len(seconds)
    yield Row.within("exposure of 1000 clients, 100 rounds", "", Sample(seconds, nothing, nothing), MAX_EXPOSURE)


def compile_once(place: Place, size: str) -> Iterator[Row]:
    """The very first export, which compiles its kernels, against the next."""
    place.model("tiny")
    ours = _export(place, "tiny", 1)
    cache = {"NUMBA_CACHE_DIR": str(place.work / "numba")}
    cold = Contender(ours.command, (), lambda: (ours.before(), place.clear("numba")), ours.after, cache)
    warm = Contender(ours.command, (), ours.before, ours.after, cache)
    samples = compare({"first": cold, "next": warm}, 1)
    place.clear("numba")
    yield Row.of("first export of all (tiny), which compiles", "", samples["first"], "the next one", samples["next"])


def training(place: Place, kind: str) -> Iterator[Row]:
    """Full training of a proxy against a plain loop that trains everything: time of a step, peak memory, start."""
    if kind not in KINDS:
        yield Row.skipped("full step", kind, f"measured for {', '.join(KINDS)}")
        return
    folder = place.training(kind)
    ours, theirs, start = Sample(), Sample(), Sample()
    size, imports = KINDS[kind].batch, imports_peak(place)
    for _ in range(place.runs):
        place.clear("update", "ours.jsonl", "plain.jsonl")
        command = ["client-train", folder / "proxy", "--out", place.work / "update", "--data", folder / "data.jsonl"]
        recipe = ["--batch-size", size, "--max-steps", TRAINED_STEPS, "--device", "cpu", "--precision", "fp32"]
        began = time.time()
        _, processor, peak = run(place.fedqsn(*command, *recipe, "--log", place.work / "ours.jsonl"))
        step, first = step_seconds(place.work / "ours.jsonl", began)
        ours.add(step, processor / TRAINED_STEPS, peak)
        start.add(first, 0.0, 0.0)
        words = "plain", folder / "proxy", folder / "data.jsonl", place.work / "plain.jsonl", size, TRAINED_STEPS
        _, processor, peak = run(place.module("benchmarks.training", *words))
        theirs.add(step_seconds(place.work / "plain.jsonl", 0.0)[0], processor / TRAINED_STEPS, peak)
    ratio = ours.largest / theirs.largest
    beyond = (ours.largest - imports) / (theirs.largest - imports)
    note = (
        f"peak {ours.largest:.0f} against {theirs.largest:.0f} MiB, {ratio:.2f}x; "
        f"{beyond:.2f}x without the {imports:.0f} MiB that importing transformers takes"
    )
    yield Row.of(f"full step, {kind}", kind, ours, "transformers + torch", theirs, most=1.05, note=note)
    yield Row.of(f"peak of full training, {kind}", kind, ours, "transformers + torch", theirs, ratio, 0.8)
    if kind == "minilm":
        yield Row.within("start of client-train to its first step, minilm", kind, start, MAX_START)
    place.clear("update", "ours.jsonl", "plain.jsonl")


def imports_peak(place: Place) -> float:
    """Peak memory of a process that only imports transformers, MiB."""
    code = "import torch, transformers; transformers.AutoTokenizer, transformers.BertModel, transformers.LlamaModel"
    return run([place.python, "-c", code])[2]


def _fits(place: Place, size: int) -> bool:
    """Is there room for so many bytes?"""
    from benchmarks.inputs import NoRoom

    try:
        place.need(size)
    except NoRoom:
        return False
    return True


def _against_floors(figure: str, size: str, samples: dict[str, Sample], read: int, written: int) -> Iterator[Row]:
    ours = samples["ours"]
    busy = sum(ours.processor) / len(ours.processor)
    note = f"{read / 1e9:.1f} GB in, {written / 1e9:.1f} GB out, {busy:.1f} processor seconds"
    for how, target in (("plain", 1.5), ("direct", None)):
        name = "floor: plain loops" if how == "plain" else "floor: loops past the page cache"
        ratio = ours.median / samples[how].median
        yield Row.of(figure, size, ours, name, samples[how], ratio, target, note)


def _export(place: Place, size: str, count: int) -> Contender:
    """export-proxy for so many clients; key and ledger are new each time."""
    clients = [f"client-{number:03d}" for number in range(count)]
    out = "out/{client}" if count > 1 else f"out/{clients[0]}"

    def fresh() -> None:
        place.clear("out", "bench.key", "bench.jsonl", "bench.jsonl.head")

    command = place.export(size, out, clients, "bench.key", "bench.jsonl")
    return Contender(command, [place.work / f"model-{size}"], fresh, fresh)


def _merge(place: Place, job: object, *more: object) -> Contender:
    from benchmarks.inputs import Job

    assert isinstance(job, Job)

    def fresh() -> None:
        place.clear("merged")

    return Contender(place.merge(job, "merged", *more), [job.model, *job.updates], fresh, fresh)


def _floor(place: Place, how: str, size: int, inputs: list[Path]) -> Contender:
    command = place.module("benchmarks.floor", how, size, place.work / "floor.bin", *inputs)
    return Contender(command, inputs, lambda: place.clear("floor.bin"), lambda: place.clear("floor.bin"))


def _proxy_bytes(place: Place, size: str) -> int:
    """Bytes of one proxy, seen once and remembered."""
    known = place.work / f"proxy-bytes-{size}"
    if not known.exists():
        place.need(SHAPES[size].parameters)
        contender = _export(place, size, 1)
        contender.before()
        run(contender.command)
        known.write_text(str(total_bytes(place.work / "out")))
        contender.after()
    return int(known.read_text())


FIGURES: dict[str, Callable[[Place, str], Iterator[Row]]] = {
    "help": help_text,
    "exposure": exposure,
    "compile": compile_once,
    "kernel": kernel,
    "peer": peer,
    "fanout": fanout,
    "merge": merge,
    "rules": rules,
    "mergekit": mergekit,
    "floor": floor,
    "audit": audit,
    "memory": memory,
    "training": training,
    "lora": lora,
    "merge-lora": merge_lora,
    "load": load,
}
PARTS: dict[str, Callable[[Place, str], Iterator[Row]]] = {
    "lora-step": lora_step,
    "lora-start": lora_start,
    "lora-bytes": lora_bytes,
}
"""Parts of figures, which can be measured by themselves."""

SIZES: dict[str, tuple[str, ...]] = {
    "help": ("",),
    "exposure": ("",),
    "compile": ("",),
    "kernel": ("",),
    "peer": ("1.1b",),
    "fanout": ("0.1b", "1.1b"),
    "merge": ("1.1b",),
    "rules": ("1.1b",),
    "mergekit": ("1.1b",),
    "floor": ("0.1b", "1.1b", "7b"),
    "audit": ("0.1b", "1.1b"),
    "memory": ("0.1b", "1.1b", "7b"),
    "training": ("minilm", "llama-0.1b"),
    "lora": ("1.1b",),
    **dict.fromkeys(PARTS, ("1.1b",)),
    "merge-lora": ("1.1b",),
    "load": ("",),
}
"""On which sizes a figure is measured; "" where the size of a model does not matter."""
