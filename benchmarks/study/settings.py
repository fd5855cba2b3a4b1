"""What the study is made of: the sizes of its tasks, its methods, and its cells in the order of their importance."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
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
    "blends",
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
    """

    name: str
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
    smoke: bool = False


TOPICS = Task("topics", words=8, max_length=16, owner_steps=300)
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
    "smoke": True,
}


def tasks(smoke: bool) -> tuple[Task, ...]:
    """Both tasks, in full or tiny."""
    if not smoke:
        return (TOPICS, NEWS)
    return tuple(
        Task(**{**asdict(task), **_TINY, "pretrain_steps": min(2, task.pretrain_steps)}) for task in (TOPICS, NEWS)
    )


@dataclass(frozen=True, slots=True)
class Method:
    """One way to do the job.

    Args:
        title: as tables and plots write it.
        kind: job for what the product's own functions do from end to end; curve for its attack alone, with more sizes;
            the others as rivals.py and trials.py have them.
        p1, p2, number_format, fill, where, schedule, train, preset: as `mask` and `export_proxy` take them.
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

METHODS: tuple[Method, ...] = (
    FEDAVG,
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
)


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
)


def _blends(method: Method) -> Method:
    """The same job without its attack, restored with many blends."""
    return Method(**(asdict(method) | {"name": f"{method.name}{BLENDS_ENDING}", "kind": "blends", "headline": False}))


BLENDS_ENDING = "-blends"
CHOICES = tuple(_blends(_all(p1)) for p1 in (0.5, 0.8, 0.9))

SIZES = (64, 256)
LONG = (32, 1024)
LONG_ENDING = "-long"
BLENDS = (0.0, 0.25, 0.5, 1.0)
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
        return LONG if self.method.name.endswith(LONG_ENDING) else SIZES

    @property
    def blends(self) -> tuple[float, ...]:
        """Fixed blends to measure beside the one that was looked for."""
        if self.method.kind == "blends":
            return MANY_BLENDS
        return BLENDS if self.seed == 0 and self.method.headline and self.method.hides else ()

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides its result."""
        return {
            "version": VERSION,
            "task": asdict(self.task),
            "seed": self.seed,
            "method": asdict(self.method),
            "sizes": list(self.sizes),
            "blends": list(self.blends),
        }


def digest(settings: object) -> str:
    """Ten hex digits that name settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def cells(seeds: int, *, smoke: bool = False, long: bool = False) -> list[Cell]:
    """All cells; the first ones tell most."""
    found: list[Cell] = []
    first = [WORLD, FLOOR, *METHODS[:4]]
    found += _each(smoke, [0], first)
    found += _each(smoke, [0], [*METHODS[4:], *ABLATIONS])
    for seed in range(1, seeds):
        found += _each(smoke, [seed], [WORLD, FLOOR, *METHODS])
    # of the language model alone: where 64 examples teach the whole skill, no blend has anything to choose
    found += [cell for cell in _each(smoke, range(seeds), CHOICES) if cell.task.name == NEWS.name]
    if long:
        found += _each(smoke, [0], [_long(method) for method in (FLOOR, PAPER, STRONG, METHODS[3])])
    return found


def _each(smoke: bool, seeds: Sequence[int], methods: Sequence[Method]) -> Iterator[Cell]:
    for seed in seeds:
        for method in methods:
            for task in tasks(smoke):
                yield Cell(task, seed, method)


def _long(method: Method) -> Method:
    """The same method's attack with other sizes, without the job."""
    kind = "floor" if method.kind == "floor" else "curve"
    return Method(**(asdict(method) | {"name": f"{method.name}{LONG_ENDING}", "kind": kind, "ablation": True}))


def floor_of(cell: Cell) -> Cell:
    """The cell that measures the same attacks with the public base alone."""
    return Cell(cell.task, cell.seed, FLOOR if cell.sizes == SIZES else _long(FLOOR))
