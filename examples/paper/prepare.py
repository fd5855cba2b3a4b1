"""Make a job of one data set of the paper: its model, the data of each client, and the owner's evaluation data.

    python prepare.py rte --out work/rte
    python prepare.py viggo --out work/viggo --clients alice bob --limit 500
    python prepare.py rte --out work/rte --source files --model model      # offline: files/rte/train.parquet ...

Without --source, the Parquet files that the hub keeps of every public data set are fetched.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import csv, parquet

Row = Mapping[str, Any]
PARQUET = "refs/convert/parquet"  # the branch on which the hub keeps them: CONFIG/SPLIT/0000.parquet
ROBERTA, GPT2 = "FacebookAI/roberta-base", "openai-community/gpt2"


@dataclass(frozen=True)
class DataSet:
    """Where a data set is, and how its rows become those of `fedqsn client-train`.

    Args:
        repository: on the hub. config: of several in it.
        model: what the paper trains on it.
        rows: rows for training and evaluation of one row; with `every`, all right answers of it.
        labels: names of the classes; () for a language model.
    """

    repository: str
    model: str
    rows: Callable[[Row, bool], Iterator[dict[str, Any]]]
    labels: tuple[str, ...] = ()
    config: str = ""


def classified(*columns: str) -> Callable[[Row, bool], Iterator[dict[str, Any]]]:
    """Rows of GLUE: one or two texts, and the number of a class."""

    def rows(row: Row, every: bool) -> Iterator[dict[str, Any]]:
        texts = dict(zip(("text", "text_pair"), (row[column] for column in columns), strict=False))
        yield {**texts, "label": int(row["label"])}

    return rows


def answered(prompt: Callable[[Row], str], target: str = "target") -> Callable[[Row, bool], Iterator[dict[str, Any]]]:
    """Rows of data to text: a prompt, and what to write; for evaluation with all references."""

    def rows(row: Row, every: bool) -> Iterator[dict[str, Any]]:
        right = list(row.get("references") or []) if every else []
        for text in right or [row[target]]:
            yield {"prompt": f"{prompt(row)}\n\n", "completion": text.strip()}

    return rows


def triples(row: Row) -> str:
    """A set of triples as one line."""
    return " | ".join(" : ".join(triple) for triple in row["tripleset"])


GLUE = "nyu-mll/glue"
DATA_SETS = {
    "rte": DataSet(GLUE, ROBERTA, classified("sentence1", "sentence2"), ("entailment", "not_entailment"), "rte"),
    "sst2": DataSet(GLUE, ROBERTA, classified("sentence"), ("negative", "positive"), "sst2"),
    "mrpc": DataSet(GLUE, ROBERTA, classified("sentence1", "sentence2"), ("not_equivalent", "equivalent"), "mrpc"),
    "qqp": DataSet(GLUE, ROBERTA, classified("question1", "question2"), ("not_duplicate", "duplicate"), "qqp"),
    "qnli": DataSet(GLUE, ROBERTA, classified("question", "sentence"), ("entailment", "not_entailment"), "qnli"),
    "e2e": DataSet("GEM/e2e_nlg", GPT2, answered(lambda row: row["meaning_representation"])),
    "dart": DataSet("GEM/dart", GPT2, answered(triples)),
    "dialogsum": DataSet("knkarthick/dialogsum", GPT2, answered(lambda row: row["dialogue"], "summary")),
    "viggo": DataSet("GEM/viggo", GPT2, answered(lambda row: row["meaning_representation"])),
}


def fetched(data_set: DataSet, split: str) -> list[Path]:
    """Fetch the files of a split from the hub."""
    from huggingface_hub import hf_hub_download, list_repo_files

    place = {"repo_id": data_set.repository, "repo_type": "dataset", "revision": PARQUET}
    names = [
        name
        for name in sorted(list_repo_files(**place))
        if f"/{split}/" in name and name.endswith(".parquet") and name.startswith(data_set.config)
    ]
    return [Path(hf_hub_download(filename=name, **place)) for name in names]


def read(path: Path) -> list[dict[str, Any]]:
    """All rows of a file."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    table = csv.read_csv(path) if path.suffix == ".csv" else parquet.read_table(path)
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def raw(name: str, split: str, source: Path | None) -> list[dict[str, Any]]:
    """All rows of a split, from the hub or from SOURCE/NAME/SPLIT.*."""
    paths = fetched(DATA_SETS[name], split) if source is None else sorted((source / name).glob(f"{split}.*"))
    if not paths:
        sys.exit(f"prepare.py: no files of {name}, split {split}")
    return [row for path in paths for row in read(path)]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def write_data(name: str, options: argparse.Namespace) -> None:
    """Share the training data among the clients, and keep the validation data for the owner."""
    make, folder = DATA_SETS[name].rows, options.out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    train = [one for row in raw(name, "train", options.source) for one in make(row, False)]
    random.Random(options.seed).shuffle(train)
    train = train[: options.limit]
    for number, client in enumerate(options.clients):
        write(folder / f"{client}.jsonl", train[number :: len(options.clients)])
    dev = [one for row in raw(name, "validation", options.source)[: options.limit] for one in make(row, True)]
    write(folder / "dev.jsonl", dev)


def write_model(name: str, options: argparse.Namespace) -> None:
    """The owner's model: pretrained, with a new head where classes are to be told apart."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    labels, source = DATA_SETS[name].labels, options.model or DATA_SETS[name].model
    torch.manual_seed(options.seed)
    if labels:
        names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        model = AutoModelForSequenceClassification.from_pretrained(source, **names)
    else:
        model = AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(options.out / "global")
    AutoTokenizer.from_pretrained(source).save_pretrained(options.out / "global")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=DATA_SETS)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--source", type=Path, metavar="DIR", help="take files from here, not from the hub")
    parser.add_argument("--model", metavar="MODEL", help="a folder or a name on the hub; default: the paper's")
    parser.add_argument("--clients", nargs="+", default=["alice", "bob", "carol", "dave"], metavar="NAME")
    parser.add_argument("--limit", type=int, metavar="N", help="use so many rows of each split at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_data(options.name, options)
    write_model(options.name, options)


if __name__ == "__main__":
    main()
