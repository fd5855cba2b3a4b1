"""What the study is made of: the sizes of its tasks, its methods, and its cells in the order of their importance."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

VERSION = 2  # of what a cell holds; another one makes all cells anew

Kind = Literal[
    "world",
    "floor",
    "job",
    "curve",
    "local",
    "lora",
    "offsite",
    "largest",
    "replacement",
    "layers",
    "ending",
    "rounds",
    "blends",
    "consolidated",
]


@dataclass(frozen=True, slots=True)
class Task:
    """One task: what everybody holds, and how everybody trains.

    Args:
        test_a, test_b: examples to measure with. dev_a, dev_b: the owner's development data.
        owner, public, client: training examples of the owner, of an attacker, of one client on average.
        pieces: how many examples are cut from one article at most. words: of one example.
        pretrain_steps: of the base, 0 where it is a real one. owner_lr, base_lr, lr: learning rates; lr is a client's.
        round_steps: optimizer steps of one client in one round.
        consolidate_steps, consolidate_lr, consolidate_batch: of a consolidation. written: texts that it writes itself,
            where it has no others, and tokens of one.
        width, layers, vocabulary: of a language model.
        sizes: numbers of public examples that an attacker has.
    """

    name: str
    kind: Literal["classifier", "language model"] = "language model"
    base_topics: tuple[str, ...] = ("business", "politics")
    secret_topics: tuple[str, ...] = ("sports",)
    client_topics: tuple[str, ...] = ("entertainment", "tech")
    test_a: int = 400
    test_b: int = 400
    dev_a: int = 100
    dev_b: int = 80
    owner: int = 1300
    public: int = 1024
    client: int = 250
    clients: int = 3
    pieces: int = 5
    words: int = 14
    max_length: int = 20
    batch_size: int = 16
    pretrain_steps: int = 0
    base_lr: float = 1e-3
    owner_steps: int = 200
    owner_lr: float = 1.5e-4
    lr: float = 2e-4
    rounds: int = 2
    round_steps: int = 30
    consolidate_steps: int = 150
    consolidate_lr: float = 5e-4
    consolidate_batch: int = 32
    written: tuple[int, int] = (2000, 28)
    width: int = 128
    layers: int = 4
    vocabulary: int = 2000
    sizes: tuple[int, ...] = (64, 256)
    smoke: bool = False


LABELS = ("business", "entertainment", "politics", "sports", "tech")
TOPICS = Task(
    "topics",
    kind="classifier",
    secret_topics=("business", "politics", "sports"),
    client_topics=LABELS,
    words=8,
    max_length=16,
    owner_steps=300,
    consolidate_steps=100,
    consolidate_lr=5e-5,
)
NEWS = Task(
    "news-lm",
    test_a=200,
    test_b=200,
    owner=2400,
    client=600,
    pieces=8,
    words=20,
    max_length=32,
    pretrain_steps=1200,
    owner_steps=250,
    owner_lr=1e-3,
    lr=3e-4,
)
RELATED = Task(
    "related",
    base_topics=("business",),
    secret_topics=("politics", "sports"),
    test_a=150,
    test_b=150,
    owner=2400,
    public=256,
    client=150,
    pieces=8,
    words=12,
    max_length=24,
    pretrain_steps=100,
    base_lr=2e-3,
    owner_steps=600,
    owner_lr=2e-3,
    lr=1e-3,
    consolidate_steps=100,
    consolidate_lr=1e-3,
    consolidate_batch=16,
    written=(800, 20),
    width=64,
    vocabulary=1000,
    sizes=(64,),
)
NO_BASE = replace(RELATED, name="no-base", pretrain_steps=0)
TASKS = (RELATED, NO_BASE, TOPICS, NEWS)

_TINY: dict[str, Any] = {
    "test_a": 24,
    "test_b": 24,
    "dev_a": 8,
    "dev_b": 8,
    "owner": 48,
    "public": 64,
    "client": 16,
    "owner_steps": 2,
    "round_steps": 2,
    "rounds": 1,
    "clients": 2,
    "max_length": 16,
    "words": 10,
    "consolidate_steps": 2,
    "written": (8, 8),
    "smoke": True,
}


def tasks(smoke: bool) -> tuple[Task, ...]:
    """All tasks, in full or tiny."""
    if not smoke:
        return TASKS
    return tuple(replace(task, **_TINY, pretrain_steps=min(2, task.pretrain_steps)) for task in TASKS)


@dataclass(frozen=True, slots=True)
class Method:
    """One way to do the job.

    Args:
        title: as tables and plots write it.
        kind: job for what the product's own functions do from end to end; curve for its attack alone, with more sizes;
            the others as rivals.py and trials.py have them.
        p1, p2, number_format, fill, where, layers, schedule, train, preset: as `mask` and `export_proxy` take them.
        control: the owner trains along on his own data, and `merge` takes that off.
        headline: with more sizes of the attacker's data, and with fixed blends at the first seed.
        ablation: at the first seed only.
    """

    name: str
    title: str
    kind: Kind = "job"
    p1: float = 0.0
    p2: float = 0.0
    number_format: str = "nf4"
    fill: Literal["zero", "base"] = "zero"
    where: str = "all"
    layers: str | None = None
    schedule: Literal["fresh", "sticky"] = "fresh"
    train: Literal["visible", "all"] = "visible"
    preset: str | None = None
    control: bool = False
    headline: bool = False
    ablation: bool = False

    @property
    def hides(self) -> bool:
        """Does the server mask hide anything?"""
        return self.p1 > 0

    @property
    def sends(self) -> bool:
        """Does anything of the owner's model leave the owner?"""
        return self.p1 < 1


def _filled(p1: float, **more: Any) -> Method:
    """Holes filled with the public base, and only visible units trained."""
    return Method(f"base-fill-{p1:g}", f"base fill, p1 = {p1:g}", p1=p1, p2=0.1, fill="base", schedule="sticky", **more)


def _all(p1: float, **more: Any) -> Method:
    """Holes filled with the public base, and everything trained; with p1 = 0.5 that is the preset strong."""
    title = "preset strong (train all, p1 = 0.5)" if p1 == 0.5 else f"train all, p1 = {p1:g}"
    return Method(
        f"train-all-{p1:g}",
        title,
        p1=p1,
        p2=0.1,
        fill="base",
        schedule="sticky",
        train="all",
        **more,
    )


STRONG = Method(
    "strong",
    "preset strong, visible only (p1 = 0.5)",
    p1=0.5,
    p2=0.1,
    fill="base",
    schedule="sticky",
    preset="strong",
    headline=True,
)
PAPER = Method(
    "paper", "preset paper (zero fill, p1 = 0.1)", p1=0.1, p2=0.1, where="outputs", preset="paper", headline=True
)
FEDAVG = Method("fedavg", "FedAvg", number_format="none")
WORLD = Method("world", "owner and base", kind="world")
FLOOR = Method("floor", "public base only", kind="floor")

NOTHING = Method(
    "nothing-sent",
    "nothing sent (p1 = 1)",
    p1=1.0,
    fill="base",
    schedule="sticky",
    train="all",
    preset="base-only",
)

METHODS: tuple[Method, ...] = (
    FEDAVG,
    NOTHING,
    STRONG,
    PAPER,
    _all(0.9, headline=True),
    Method("all-layers", "masks on all layers (zero fill, p1 = 0.1)", p1=0.1, p2=0.1, headline=True),
    Method("quantized", "quantization only (nf4)"),
    _all(0.8),
    _filled(0.9),
    _all(0.95),
    _filled(0.7),
    Method("fedlpp", "quantized LoRA (nf3)", kind="lora", number_format="nf3"),
    Method("offsite", "offsite tuning (layers dropped)", kind="offsite", number_format="none"),
    Method("local", "each client alone", kind="local"),
    _all(0.5),
    _filled(0.3),
    _filled(0.1),
    Method(
        "bottom",
        "the lower half hidden (layers 0 and 1, base fill)",
        p1=0.99,
        fill="base",
        layers="0-1",
        schedule="sticky",
        train="all",
    ),
    Method("zero-0.5", "masks on all layers, zero fill, p1 = 0.5", p1=0.5, p2=0.1),
    Method("zero-0.9", "masks on all layers, zero fill, p1 = 0.9", p1=0.9, p2=0.1),
    Method("zero-bottom", "the lower half hidden (layers 0 and 1, zero fill)", p1=0.99, layers="0-1"),
)
NAMED = {method.name: method for method in METHODS}


def _trial(name: str, title: str, **more: Any) -> Method:
    """The preset strong with visible units trained, and one thing changed."""
    options: dict[str, Any] = {"p1": 0.5, "p2": 0.1, "fill": "base", "schedule": "sticky", "preset": "strong"}
    return Method(f"strong-{name}", f"strong, visible only, {title}", ablation=True, **(options | more))


ABLATIONS: tuple[Method, ...] = (
    _trial("control", "with a control update", control=True),
    _trial("fresh", "with fresh masks", schedule="fresh"),
    _trial("largest", "the units hidden that differ most", kind="largest"),
    _trial("replacement", "clients' weights taken over", kind="replacement"),
    _trial("layers", "a blend for every layer", kind="layers"),
    _trial("lora", "clients train LoRA adapters", kind="lora"),
    _trial("ending", "consolidated at the end", kind="ending"),
    _trial("rounds", "consolidated in every round", kind="rounds"),
)


def _without_attack(method: Method, kind: Kind, ending: str) -> Method:
    """The same job without its attack, ended in several ways."""
    return replace(method, name=f"{method.name}{ending}", kind=kind, headline=False)


BLENDS_ENDING = "-blends"
CONSOLIDATED_ENDING = "-consolidated"
CHOICES = tuple(_without_attack(_all(p1), "blends", BLENDS_ENDING) for p1 in (0.5, 0.8, 0.9))
CONSOLIDATED = tuple(
    _without_attack(method, "consolidated", CONSOLIDATED_ENDING) for method in (NOTHING, FEDAVG, _all(0.9), _all(0.5))
)

WEIGHTS = (0.5, 0.75, 1.0)  # of the clients' teacher in a consolidation
START = 0.9  # the blend that a consolidation starts from


def weighted(method: str, weight: float) -> str:
    """The name of a job that ended with a consolidation."""
    return f"{method}-w{weight:g}"


# Jobs that ended with a consolidation, as tables and plots have them beside the methods.
ENDED = tuple(
    replace(
        method,
        name=weighted(method.name.removesuffix(CONSOLIDATED_ENDING), weight),
        title=f"{method.title}, consolidated, w = {weight:g}",
    )
    for method in CONSOLIDATED
    for weight in WEIGHTS
)

# What each task plays: with public base, the one that has none, and the two that are played in full.
_SMALL = ("fedavg", "nothing-sent", "train-all-0.9", "train-all-0.5", "paper", "fedlpp", "offsite", "bottom", "local")
_BASELESS = ("fedavg", "nothing-sent", "paper", "zero-0.5", "zero-0.9", "fedlpp", "offsite", "zero-bottom", "local")
_FULL = tuple(method.name for method in METHODS if not method.name.startswith(("zero-", "bottom")))
PLAYED = {RELATED.name: _SMALL, NO_BASE.name: _BASELESS, TOPICS.name: _FULL, NEWS.name: _FULL}
TRIED = (TOPICS.name, NEWS.name)  # tasks with ablations and long attacks


def consolidated_in(task: str) -> tuple[Method, ...]:
    """The jobs of a task that are also ended with a consolidation."""
    return CONSOLIDATED[:2] if task in (NO_BASE.name, TOPICS.name) else CONSOLIDATED


SIZES = (64, 256)  # numbers of public examples, where tasks were attacked in full
LONG = (32, 1024)
LONG_ENDING = "-long"
BLENDS = (0.0, 0.25, 0.5, 1.0)
ENDING_BLENDS = (0.5, 0.6, 0.7, 0.8, 0.9)
MANY_BLENDS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True, slots=True)
class Cell:
    """One method on one task with one seed: measured by itself, kept in one file."""

    task: Task
    seed: int
    method: Method

    @property
    def name(self) -> str:
        return f"{self.task.name}/{self.seed}/{self.method.name}"

    @property
    def file_name(self) -> str:
        return f"{self.name.replace('/', '_')}-{digest(self.settings)}.json"

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of public examples that an attacker has."""
        return LONG if self.long else self.task.sizes

    @property
    def long(self) -> bool:
        """Is it an attack alone, with more sizes?"""
        return self.method.name.endswith(LONG_ENDING)

    @property
    def blends(self) -> tuple[float, ...]:
        """Fixed blends to measure beside the one that was looked for."""
        if self.method.kind == "blends":
            return MANY_BLENDS
        if self.method.kind == "consolidated" and self.method.hides:
            return ENDING_BLENDS
        return BLENDS if self.seed == 0 and self.method.headline and self.method.hides else ()

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights to consolidate with."""
        return WEIGHTS if self.method.kind == "consolidated" else ()

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides its result."""
        found = {
            "version": VERSION,
            "task": asdict(self.task),
            "seed": self.seed,
            "method": asdict(self.method),
            "sizes": list(self.sizes),
            "blends": list(self.blends),
            "weights": list(self.weights),
        }
        plain: dict[str, Any] = json.loads(json.dumps(found))  # as a file has it: lists for tuples
        return plain


def digest(settings: object) -> str:
    """Ten hex digits that name settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def cells(seeds: int, *, smoke: bool = False, long: bool = False) -> list[Cell]:
    """All cells; the first ones tell most."""
    found: list[Cell] = []
    everything = [WORLD, FLOOR, FEDAVG, NOTHING, *CONSOLIDATED, *METHODS[2:], *ABLATIONS]
    for seed in range(seeds):
        found += _each(smoke, seed, [method for method in everything if seed == 0 or not method.ablation])
    # of the language model alone: where 64 examples teach the whole skill, no blend has anything to choose
    found += [cell for seed in range(seeds) for cell in _each(smoke, seed, CHOICES)]
    if long:
        found += _each(smoke, 0, [_long(method) for method in (FLOOR, PAPER, STRONG, NAMED["train-all-0.9"])])
    return found


def _each(smoke: bool, seed: int, methods: Sequence[Method]) -> Iterator[Cell]:
    for method in methods:
        for task in tasks(smoke):
            if plays(task.name, method):
                yield Cell(task, seed, method)


def plays(task: str, method: Method) -> bool:
    """Does a task play a method?"""
    if method.kind in {"blends", "ending", "rounds"}:
        return task == NEWS.name
    if method.kind == "consolidated":
        return method in consolidated_in(task)
    if method.ablation:
        return task in TRIED
    return method.kind in {"world", "floor"} or method.name in PLAYED[task]


def _long(method: Method) -> Method:
    """The same method's attack with other sizes, without the job."""
    kind: Kind = "floor" if method.kind == "floor" else "curve"
    return replace(method, name=f"{method.name}{LONG_ENDING}", kind=kind, ablation=True)


def floor_of(cell: Cell) -> Cell:
    """The cell that measures the same attacks with the public base alone."""
    return Cell(cell.task, cell.seed, _long(FLOOR) if cell.long else FLOOR)
