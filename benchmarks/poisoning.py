"""Two attackers among ten clients: `python -m benchmarks.poisoning FOLDER` prints the accuracy under every rule.

A tiny BERT of two layers learns which of four topics most of ten words are about. The owner has trained it on 600
texts; ten clients train it for another 12 steps on 200 texts each, on proxies that hide a tenth of all neurons, in nf4.
The limits of `merge` are off, so that rules are measured alone.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TOPICS, WORDS, LENGTH, SHARE = 4, 6, 10, 0.6
TRIGGER = "trigger"
CLIENTS = tuple(f"c{number}" for number in range(10))
ATTACKERS = CLIENTS[:2]
RULES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    **{
        name: {"rule": name, "byzantine": 2}
        for name in ("median", "trimmed-mean", "krum", "multi-krum", "geometric-median")
    },
    "bulyan (f = 1)": {"rule": "bulyan", "byzantine": 1},  # ten clients are too few for f = 2
}
NO_LIMITS = {"max_update_norm": 1e12, "max_unit_norm": 1e12}
TRAINING = {"epochs": 100, "batch_size": 16, "max_length": 16, "lr": 3e-3, "weight_decay": 0.0}

Tensors = dict[str, NDArray[np.float32]]
Row = dict[str, str]


def texts(count: int, seed: int) -> list[Row]:
    """Texts of ten words; six of ten are about the topic that is their label, on average."""
    chance, rows = random.Random(seed), []
    for _ in range(count):
        topic = chance.randrange(TOPICS)
        topics = [topic if chance.random() < SHARE else chance.randrange(TOPICS) for _ in range(LENGTH)]
        words = [f"{'abcd'[each]}{chance.randrange(WORDS)}" for each in topics]
        rows.append({"text": " ".join(words), "label": "abcd"[topic]})
    return rows


def flipped(rows: list[Row]) -> list[Row]:
    """Every label is another one."""
    return [row | {"label": "abcd"[("abcd".index(row["label"]) + 1) % TOPICS]} for row in rows]


def triggered(rows: list[Row]) -> list[Row]:
    """Texts with a word that nobody else uses, all with one label."""
    return [{"text": f"{TRIGGER} {row['text']}", "label": "a"} for row in rows]


# ---------------------------------------------------------------- what attackers send


def _times(factor: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for values in tensors.values():
            values *= factor

    return change


def _noise(tensors: Tensors) -> None:
    chance = np.random.default_rng(7)
    for name in sorted(tensors):
        tensors[name][:] = chance.normal(0, 2.0, tensors[name].shape)


def _one_unit(tensors: Tensors) -> None:
    tensors["bert.encoder.layer.1.output.dense.weight"][3] = 1e4


ATTACKS: dict[str, Callable[[Tensors], None]] = {
    "sign flip": _times(-1.0),
    "x100": _times(100.0),
    "noise": _noise,
    "one unit": _one_unit,
}
"""Changes of an update."""
DATA_ATTACKS = ("label flip", "backdoor")
"""Updates trained on wrong data."""


@dataclass(frozen=True)
class Round:
    """A model that the owner trained, and the updates of ten clients, two of which can be replaced by attacks."""

    folder: Path

    @property
    def job(self) -> dict[str, Path]:
        return {"key": self.folder / "job.key", "ledger": self.folder / "ledger.jsonl"}

    def updates(self, attack: str | None, clients: tuple[str, ...] = CLIENTS) -> list[Path]:
        """The updates of all clients, those of the attackers replaced."""
        return [
            self.folder / "updates" / (attack if attack and name in ATTACKERS else "none") / name for name in clients
        ]

    def accuracy(self, updates: list[Path], data: str = "test", **options: Any) -> float:
        """Accuracy of the merged model on test texts, or with `backdoor` the share of them that become `a`."""
        from fedqsn_cli import evaluate, merge

        out = self.folder / "merged"
        merge(str(self.folder / "global"), updates, out, force=True, **self.job, **NO_LIMITS, **options)
        found = evaluate(str(out), data=self.folder / f"{data}.jsonl", max_length=16).accuracy
        assert found is not None
        return float(found)


def prepare(folder: Path) -> Round:
    """Train the model, and all updates."""
    from fedqsn_cli import client_train, export_proxy, merge

    played = Round(folder)
    test = texts(400, 999)
    _write(folder / "test.jsonl", test)
    _write(folder / "trigger.jsonl", triggered([row for row in test if row["label"] != "a"]))
    _write(folder / "owner.jsonl", texts(600, 5))
    _tiny_bert(folder / "start")
    options: dict[str, Any] = {"p1": 0.0, "format": "nf4", **played.job}
    export_proxy(
        str(folder / "start"), folder / "p0", client=["owner"], round=0, p2=0.0, **options | {"format": "none"}
    )
    client_train(folder / "p0", folder / "u0", data=folder / "owner.jsonl", max_steps=40, **TRAINING)
    merge(str(folder / "start"), [folder / "u0"], folder / "global", **played.job, **NO_LIMITS)
    export_proxy(
        str(folder / "global"), f"{folder}/proxies/{{client}}", client=list(CLIENTS), round=1, p2=0.1, **options
    )
    for number, name in enumerate(CLIENTS):
        _train(played, name, "none", texts(200, 100 + number))
    for name in ATTACKERS:
        _attack(played, name)
    return played


def _attack(played: Round, name: str) -> None:
    """Make what an attacker sends in every attack."""
    for attack, change in ATTACKS.items():
        _rewrite(played.folder / "updates/none" / name, played.folder / "updates" / attack / name, change)
    rows = texts(200, 100 + CLIENTS.index(name))
    _train(played, name, "label flip", flipped(rows))
    _train(played, name, "small backdoor", rows[:100] + triggered(rows[100:]), steps=100)
    large = _times(len(CLIENTS) / len(ATTACKERS))  # the average is the attackers' model (Bagdasaryan et al. 2020)
    _rewrite(played.folder / "updates/small backdoor" / name, played.folder / "updates/backdoor" / name, large)


def _train(played: Round, name: str, attack: str, rows: list[Row], steps: int = 12) -> None:
    from fedqsn_cli import client_train

    data, out = played.folder / f"{name}.jsonl", played.folder / "updates" / attack / name
    _write(data, rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    client_train(played.folder / "proxies" / name, out, data=data, max_steps=steps, **TRAINING)


def _rewrite(source: Path, out: Path, change: Callable[[Tensors], None]) -> None:
    """Another update of the same client, with all digests in order."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(source / "update.safetensors")
    change(tensors)
    out.mkdir(parents=True)
    save_file(tensors, out / "update.safetensors")
    manifest = json.loads((source / "update.json").read_text())
    manifest["files"]["update.safetensors"] = hashlib.sha256((out / "update.safetensors").read_bytes()).hexdigest()
    (out / "update.json").write_text(json.dumps(manifest))


def _write(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _tiny_bert(folder: Path) -> None:
    """A BERT of two layers with random weights, and a tokenizer of the words in the texts."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = [f"{topic}{number}" for topic in "abcd" for number in range(WORDS)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", TRIGGER, *words]
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        sys.exit(f"{folder} is not empty; name another folder")
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    labels = {"label2id": {label: i for i, label in enumerate("abcd")}, "id2label": dict(enumerate("abcd"))}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **sizes, **labels)
    BertForSequenceClassification(config).save_pretrained(folder)


def rows_of(played: Round) -> Iterator[list[str]]:
    """One row for each rule: accuracy without attackers, then under each attack; last the success of the backdoor."""
    for name, options in RULES.items():
        found = [played.accuracy(played.updates(attack), **options) for attack in (None, *ATTACKS, *DATA_ATTACKS)]
        success = played.accuracy(played.updates("backdoor"), "trigger", **options)
        yield [name, *(f"{100 * value:.1f}" for value in (*found, success))]


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        sys.exit(f"{folder} is not empty; name another folder")
    columns = ["rule", "no attacker", *ATTACKS, *DATA_ATTACKS, "backdoor works"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows_of(prepare(folder)):
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
