"""`client-train --show-examples`: what is printed is what is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedqsn_cli.cli.app import main
from fedqsn_cli.options import TrainOptions
from fedqsn_cli.training.data.shown import show_examples
from support.helpers import contents
from support.tokenizers import tokenizer
from support.training_jobs import labelled, make_proxy, small_model, write_lines

ROWS = [{"prompt": "2+2=", "completion": "4", "id": 1}, {"prompt": "hello ", "completion": "world", "id": 2}]


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with proxy/ of a language model and data.jsonl."""
    here = tmp_path_factory.mktemp("writer")
    given = tokenizer("byte-level")
    small_model(here / "model", "llama", vocab_size=len(given))
    given.save_pretrained(here / "model")
    make_proxy(here / "model", here / "proxy")
    write_lines(here / "data.jsonl", ROWS)
    return here


def test_tokens_and_what_counts_are_shown(writer: Path) -> None:
    found = show_examples(writer / "proxy", TrainOptions("update", data=writer / "data.jsonl"), 5)
    assert (found.task, found.examples, found.unused_columns) == ("causal-lm", 2, ("id",))
    first = found.shown[0].tokens
    counting = [token for token in first if token.counts]
    assert "".join(token.token for token in first) == "2+2=4</s>"
    assert [token.learns for token in counting] == ["4", "</s>"] == [token.token for token in counting]


def test_the_label_of_a_text_is_shown(tmp_path: Path) -> None:
    proxy = make_proxy(small_model(tmp_path / "model"), tmp_path / "proxy")
    found = show_examples(proxy, TrainOptions("update", data=labelled(tmp_path / "data.jsonl")), 2)
    assert [example.label for example in found.shown] == ["LABEL_0", "LABEL_1"]
    assert not any(token.counts for example in found.shown for token in example.tokens)


def test_as_a_command_nothing_is_trained_and_nothing_is_written(
    writer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(writer)
    out = str(tmp_path / "update")
    command = ["client-train", str(writer / "proxy"), "--out", out, "--data", str(writer / "data.jsonl")]
    assert main([*command, "--show-examples", "1"]) == 0
    printed = capsys.readouterr().out
    assert "columns not used" in printed and "example 1" in printed and "example 2" not in printed
    assert main([*command, "--show-examples", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [token["counts"] for token in document["shown"][0]["tokens"]][-2:] == [True, True]
    assert main([*command, "--show-examples", "1", "--dry-run"]) == 2
    assert main([*command, "--show-examples", "0"]) == 2
    assert contents(writer) == before and not list(tmp_path.iterdir())
