"""examples/paper, offline: all nine data sets from small files with the columns of the hub."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from support.scripts import Scripts
from support.tokenizers import tokenizer
from support.training_jobs import small_model
from support.untrainable import VARIABLE

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "examples" / "paper"
TEXT = "the quick brown fox jumps over the lazy dog; hello world"


def glue(number: int, *columns: str) -> dict[str, Any]:
    return {**{column: f"{column} {TEXT[number:]}" for column in columns}, "label": number % 2, "idx": number}


def gem(number: int, **more: Any) -> dict[str, Any]:
    target = f"it is a fox {number}"
    return {"gem_id": f"x-{number}", **more, "target": target, "references": [target, "hello there!"]}


def rows(name: str, count: int = 10) -> list[dict[str, Any]]:
    """Rows as the hub has them."""
    make = {
        "rte": lambda i: glue(i, "sentence1", "sentence2"),
        "sst2": lambda i: glue(i, "sentence"),
        "mrpc": lambda i: glue(i, "sentence1", "sentence2"),
        "qqp": lambda i: glue(i, "question1", "question2"),
        "qnli": lambda i: glue(i, "question", "sentence"),
        "e2e": lambda i: gem(i, gem_parent_id=f"x-{i}", meaning_representation=f"name[The Eagle], food[{i}]"),
        "dart": lambda i: gem(i, dart_id=i, tripleset=[["fox", "jumps", f"dog {i}"], ["dog", "is", "lazy"]]),
        "dialogsum": lambda i: {
            "id": f"train_{i}",
            "dialogue": f"#Person1#: hello, {i}!\n#Person2#: hello there!",
            "summary": "they say hello",
            "topic": "greeting",
        },
        "viggo": lambda i: gem(i, meaning_representation=f"inform(name[The Eagle], food[{i}])"),
    }[name]
    return [make(number) for number in range(count)]


NAMES = ("rte", "sst2", "mrpc", "qqp", "qnli", "e2e", "dart", "dialogsum", "viggo")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files of all data sets, and roberta/ and gpt2/."""
    folder = tmp_path_factory.mktemp("source")
    for name in NAMES:
        (folder / name).mkdir()
        for split in ("train", "validation"):
            if name == "dialogsum":
                with (folder / name / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, list(rows(name)[0]), quoting=csv.QUOTE_ALL)
                    writer.writeheader()
                    writer.writerows(row | {"dialogue": row["dialogue"].replace("\n", " ")} for row in rows(name))
            else:
                parquet.write_table(pyarrow.Table.from_pylist(rows(name)), folder / name / f"{split}.parquet")
    for family, head, positions in (
        ("roberta", "RobertaForMaskedLM", "max_position_embeddings"),
        ("gpt2", "GPT2LMHeadModel", "n_positions"),
    ):
        given = tokenizer("byte-level")
        small_model(folder / family, family, head=head, vocab_size=len(given), **{positions: 256})
        given.save_pretrained(folder / family)
    return folder


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("paper_prepare", PAPER / "prepare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_the_recipe_knows_the_nine_data_sets(prepare: Any) -> None:
    assert tuple(prepare.DATA_SETS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_row_becomes_one_of_a_client_and_none_is_lost(
    name: str, prepare: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = "roberta" if prepare.DATA_SETS[name].labels else "gpt2"
    words = [name, "--out", tmp_path, "--source", source, "--model", source / model, "--clients", "ann", "bob"]
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, words)])
    prepare.main()
    train, dev = [*lines(tmp_path / "data/ann.jsonl"), *lines(tmp_path / "data/bob.jsonl")], tmp_path / "data/dev.jsonl"
    columns = {"text", "text_pair", "label"} if model == "roberta" else {"prompt", "completion"}
    assert len(train) == 10 and set(train[0]) == columns - ({"text_pair"} if name == "sst2" else set())
    assert len(lines(dev)) == (20 if name in ("e2e", "dart", "viggo") else 10)
    if model == "roberta":
        assert sorted(row["label"] for row in train) == [0] * 5 + [1] * 5
    config = json.loads((tmp_path / "global/config.json").read_text())
    head = "RobertaForSequenceClassification" if model == "roberta" else "GPT2LMHeadModel"
    assert config["architectures"] == [head]


def test_triples_become_a_line(prepare: Any) -> None:
    assert prepare.triples(rows("dart")[1]) == "fox : jumps : dog 1 | dog : is : lazy"


def test_files_of_the_hub_are_chosen_by_config_and_split(prepare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    names = ["rte/train/0000.parquet", "rte/train/0001.parquet", "rte/test/0000.parquet", "sst2/train/0000.parquet"]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda **place: names)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *, filename, **place: f"/{filename}")
    found = prepare.fetched(prepare.DATA_SETS["rte"], "train")
    assert [str(path) for path in found] == ["/rte/train/0000.parquet", "/rte/train/0001.parquet"]


@pytest.mark.parametrize(
    "name", [name if name in ("rte", "viggo") else pytest.param(name, marks=pytest.mark.soak) for name in NAMES]
)
def test_the_script_plays_a_job_from_files_to_measures(
    name: str, prepare: Any, source: Path, scripts: Scripts, shell: dict[str, str], tmp_path: Path
) -> None:
    model = "roberta" if prepare.DATA_SETS[name].labels else "gpt2"
    settings = {"SOURCE": str(source), "MODEL": str(source / model), "WORK": str(tmp_path), "ROUNDS": "1"}
    settings |= {"CLIENTS": "ann", "MAX_LENGTH": "60"}
    environment = shell | settings
    environment.pop(VARIABLE)  # as strict as for everybody else
    done = scripts.run([str(PAPER / "run.sh"), name], tmp_path, environment)
    assert done.code == 0, done.err
    assert ("MCC" if model == "roberta" else "BLEU") in done.out
    assert (tmp_path / name / "final" / "fedqsn.json").is_file()
    assert len((tmp_path / name / "ledger.jsonl").read_text().splitlines()) == 1
