"""Section training: what comes of torch, whose last digits differ between machines: structure, and rough numbers.

Of updates the names, shapes and dtypes are recorded; of what commands print, everything but digests and times, with
three digits of floats.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fedqsn_cli import client_train, merge
from golden.running import (
    SECRET,
    Files,
    Job,
    Records,
    export_proxy,
    fedqsn,
    fixed_key,
    mask,
    sha256,
    succeed,
    transcript,
)
from golden.trainable import model
from support.raw_safetensors import read_file, to_bits, to_floats, write_file

KEY, LEDGER = Path("job.key"), Path("ledger.jsonl")
JOB: dict[str, Any] = {"key": KEY, "ledger": LEDGER}
CPU: dict[str, Any] = {"device": "cpu", "precision": "fp32"}


# ------------------------------------------------------------------------------------------------ jobs


def rows(path: str, lines: Iterable[Mapping[str, Any]]) -> Path:
    """A JSONL file."""
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Path(path)


def labelled(path: str, count: int = 24) -> Path:
    """Texts of different lengths whose first word tells their label."""
    texts = (" ".join([f"w{10 + row % 5}"] + ["w5", "w6", "w7"] * (row % 4)) for row in range(count))
    return rows(path, ({"text": text, "label": row % 5} for row, text in enumerate(texts)))


def plain(path: str, count: int = 12) -> Path:
    """Texts for a language model, each of them a run of successive words."""
    texts = (" ".join(f"w{3 + (row + step) % 90}" for step in range(4 + row % 5)) for row in range(count))
    return rows(path, ({"text": text} for text in texts))


def begin(family: str, **options: Any) -> Path:
    """A model, a key, and data of its task."""
    model("global", family)
    model("base", family, seed=1)
    fixed_key(SECRET, lambda: mask("global", "scratch", key=KEY, p1=0.25, **options))
    return labelled("data.jsonl") if family == "bert" else plain("data.jsonl")


# ------------------------------------------------------------------------------------------------ in the rough


def rough(text: str) -> str:
    """A text without digests and times, with three digits of floats, and with columns right beside each other."""
    text = re.sub(r"\b[0-9a-f]{64}\b", "{sha256}", text)
    text = re.sub(r'"seconds": [0-9.e-]+', '"seconds": {seconds}', text)
    text = re.sub(r" in [0-9.]+ s\b", " in {seconds} s", text)
    text = re.sub(r"(?<![\w.])-?[0-9]+\.[0-9]+(?:e[+-]?[0-9]+)?(?![\w.])", _rounded, text)
    return re.sub(r"(?<=\S) {2,}", "  ", text)


def _rounded(match: re.Match[str]) -> str:
    return f"{round(float(match[0]), 3):.3g}"


def ran(*lines: str) -> str:
    """Commands, and roughly what they print."""
    return "\n".join(rough(transcript(line, fedqsn(*shlex.split(line)))) for line in lines)


# ------------------------------------------------------------------------------------------------ updates

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "bert nf4": ("bert", {}, {}),
    "bert elements, none, bf16": ("bert", {"axis": "element", "format": "none"}, {"update_format": "bf16"}),
    "bert inputs, trained fill": (
        "bert",
        {"axis": "input", "fill": "base", "public_base": "base", "train": "all"},
        {"update_format": "fp16"},
    ),
    "gpt2 int8": ("gpt2", {"format": "int8"}, {"gradient_accumulation": 2, "batch_size": 2}),
    "llama nf3, bf16": ("llama", {"format": "nf3", "where": "mlp"}, {"update_format": "bf16", "epochs": 0.5}),
    "mixtral fp4": ("mixtral", {"format": "fp4", "schedule": "sticky"}, {"max_steps": 1}),
    "gpt_oss none": ("gpt_oss", {"format": "none"}, {"warmup_ratio": 0.0, "weight_decay": 0.0}),
}


FACTS = (
    "task",
    "examples",
    "skipped",
    "steps",
    "parameters",
    "first_loss",
    "last_loss",
    "before",
    "after",
    "precision",
)


def update(name: str) -> Files:
    """What a client sends back, and what the function returns."""
    family, exporting, training = CASES[name]
    masking = {key: exporting[key] for key in ("axis", "fill", "public_base", "where") if key in exporting}
    data = begin(family, **masking)
    export_proxy("global", "proxy", client="ann", round=1, p2=0.2, **JOB, **exporting)
    usual: dict[str, Any] = {"eval_data": data, "max_steps": 3, "lr": 1e-3} | CPU
    result = client_train("proxy", "update", data=data, **usual | training)
    tensors = read_file(Path("update/update.safetensors"))
    document = json.loads(Path("update/update.json").read_text())
    records: Records = {"files": " ".join(sorted(path.name for path in Path("update").iterdir()))}
    records |= {f"update.json {key}": rough(json.dumps(value)) for key, value in document.items()}
    records |= {f"result {key}": rough(str(getattr(result, key))) for key in FACTS}
    records |= {tensor: f"{dtype} {list(bits.shape)}" for tensor, (dtype, bits) in tensors.items()}
    return {"training/updates.json": {f"{name}: {what}": made for what, made in records.items()}}


# ------------------------------------------------------------------------------------------------ commands

TRAIN = "client-train proxy --data data.jsonl --device cpu --precision fp32"
TRAINED = [
    f"{TRAIN} --out u1 --lr 1e-3 --batch-size 8",
    f"{TRAIN} --out u2 --lr 1e-3 --batch-size 8 --eval-data data.jsonl",
    f"{TRAIN} --out u3 --lr 1e-3 --batch-size 8 --eval-data data.jsonl --json",
    f"{TRAIN} --out u4 --max-steps 1 --update-format bf16 -q",
    f"{TRAIN} --out u1 --max-steps 1",
    f"{TRAIN} --out u1 --max-steps 1 --force -q",
    "inspect u3",
]
MODELS = ("global", "server", "packed", "proxy", "next")
EVALUATED = [
    *(f"evaluate {name} --data data.jsonl --device cpu" for name in MODELS),
    "evaluate global --data data.jsonl --device cpu --json",
    "evaluate server --data data.jsonl --device cpu --max-length 3 --batch-size 5 --json",
    "evaluate proxy --data data.jsonl --device cpu --quiet",
]


def commands(family: str) -> Files:
    """What `client-train` and `evaluate` print."""
    begin(family)
    for line in (
        "mask global --out server --key job.key",
        "quantize server --out packed --format nf4",
        "export-proxy packed --out proxy --client ann --round 1 --p2 0.2 --key job.key --ledger ledger.jsonl",
    ):
        succeed(*shlex.split(line))
    trained = ran(*TRAINED)
    merge("global", ["u1"], "next", **JOB)
    return {
        f"training/client-train-{family}.txt": trained,
        f"training/evaluate-{family}.txt": ran(*EVALUATED),
    }


def searches() -> Files:
    """What `merge` finds with auto: a step that helps, steps that do not, how far hidden neurons come back."""
    begin("bert")
    export_proxy("global", "proxy", client="ann", round=1, p2=0.1, format="none", **JOB)
    mask("global", "server", key=KEY)
    client_train("proxy", "good", data="data.jsonl", max_steps=6, lr=2e-3, batch_size=8, **CPU)
    turned_round("good", "bad")
    merge("server", ["good"], "trained", **JOB)
    job = "--key job.key --ledger ledger.jsonl --eval-data data.jsonl --device cpu"
    printed = ran(
        f"merge global good --out auto --server-lr auto --report page.html {job}",
        f"merge global good --out auto-json --server-lr auto --json {job}",
        f"merge global bad --out bad-auto --server-lr auto {job}",
        f"merge global bad --out worse --server-lr auto --allow-worse {job}",
        "merge global --restore trained --out restored --blend auto --key job.key --eval-data data.jsonl --device cpu",
    )
    page = re.sub(r"(?<![\w#.-])[0-9.]+(?![\w%])", "0", Path("page.html").read_text().split("</style>")[1])
    return {"training/merge-auto.txt": printed, "training/merge-page.html": page}


def turned_round(update: str, out: str) -> None:
    """The opposite of an update."""
    shutil.copytree(update, out)
    path = Path(out, "update.safetensors")
    before = sha256(path)
    tensors = read_file(path)
    turned = {name: (dtype, to_bits(-to_floats(bits, dtype), dtype)) for name, (dtype, bits) in tensors.items()}
    write_file(path, turned, {"format": "pt"})
    manifest = Path(out, "update.json")
    manifest.write_text(manifest.read_text().replace(before, sha256(path)))


def function() -> Files:
    """An audit that runs models, and fine-tunes them. The truth is the base, trained on what it is measured with."""
    model("base", "bert")
    data = labelled("data.jsonl")
    export_proxy("base", "all", client="ann", round=1, p1=0, p2=0, format="none", key="any.key", ledger="any.jsonl")
    client_train("all", "tuning", data=data, epochs=3, lr=1e-3, batch_size=8, **CPU)
    merge("base", ["tuning"], "global", key="any.key", ledger="any.jsonl")
    fixed_key(SECRET, lambda: mask("global", "scratch", key=KEY, p1=0.25))
    export_proxy("global", "r1/{client}", client=("ann", "bob"), round=1, p2=0.3, **JOB)
    labelled("public.jsonl", 8)
    Path("policy.toml").write_text("[threat]\npublic_examples = [4, 8]\n[limits.coalition]\nrho = 0.5\ngain = 5.0\n")
    outcome = fedqsn(
        "audit",
        "r1/ann",
        "r1/bob",
        "--truth",
        "global",
        "--key",
        KEY,
        "--ledger",
        LEDGER,
        "--base",
        "base",
        "--eval-data",
        data,
        "--public-data",
        "public.jsonl",
        "--policy",
        "policy.toml",
        "--json",
    )
    document = json.loads(outcome.out)
    kept = {key: document[key] for key in ("verdict", "exit_code", "findings", "function", "unchecked")}
    kept["checked"] = [one for one in document["checked"] if one["rule"].startswith("FQ3")]
    return {"training/function.txt": rough(json.dumps(kept, indent=1)) + "\n"}


# ------------------------------------------------------------------------------------------------ errors

TEXTS: dict[str, list[dict[str, Any]]] = {
    "an unknown label": [{"text": "w3", "label": "x"}],
    "a label out of range": [{"text": "w3", "label": 9}],
    "a label that is half": [{"text": "w3", "label": 0.5}],
    "no label": [{"text": "w3"}],
    "no text": [{"label": 1}],
    "a text that is a number": [{"text": 3, "label": 1}],
    "an empty text": [{"text": "", "label": 1}],
    "a pair without second": [{"text": "w3", "text_pair": None, "label": 1}],
    "data of another task": [{"prompt": "w3", "completion": "w4"}],
    "messages": [{"messages": [{"role": "user", "content": "w3"}]}],
    "messages that are none": [{"messages": "w3"}],
    "nothing to learn": [{"prompt": "w3", "completion": ""}],
    "odd columns": [{"a": 1, "b": 2}],
}


CONFIGS: dict[str, dict[str, Any]] = {
    "without head": {"architectures": ["BertModel"]},
    "of an unknown class": {"architectures": ["FooForSequenceClassification"]},
    "of several classes": {"architectures": ["A", "B"]},
    "with another number of labels": {"id2label": {"0": "a"}},
}


def errors() -> Files:
    """What can be wrong with data, tokenizers and heads."""
    records: Records = {}
    for family in ("bert", "gpt2"):
        model(family, family)
        for what, lines in TEXTS.items():
            rows("data.jsonl", lines)
            records[f"{family}, {what}"] = last_line(f"evaluate {family} --data data.jsonl --device cpu")
    labelled("data.jsonl")
    config = Path("bert/config.json")
    document = json.loads(config.read_text())
    for what, fields in CONFIGS.items():
        config.write_text(json.dumps(document | fields))
        records[f"a model {what}"] = last_line("evaluate bert --data data.jsonl --device cpu")
    for what, file in (("without tokenizer", "tokenizer.json"), ("without config", "config.json")):
        config.write_text(json.dumps(document))
        Path("bert", file).unlink()
        records[f"a model {what}"] = last_line("evaluate bert --data data.jsonl --device cpu")
    return {"training/errors.json": records}


def last_line(line: str) -> str:
    """How a command ends, in one line."""
    outcome = fedqsn(*shlex.split(line))
    return rough(f"[{outcome.code}] {' / '.join(outcome.out.splitlines())}{outcome.err.strip()}")


def jobs() -> dict[str, Job]:
    """The jobs of this section."""
    return {
        **{name: partial(update, name) for name in CASES},
        **{f"commands {family}": partial(commands, family) for family in ("bert", "llama")},
        "searches": searches,
        "function": function,
        "errors": errors,
    }
