"""A tokenizer is the one that its tokenizer.json describes, whatever class the files beside it name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fedqsn_cli.checkpoint import Checkpoint
from fedqsn_cli.errors import InputError
from fedqsn_cli.models.tokenizer import load_tokenizer
from support.families import build
from support.tokenizers import tokenizer

TEXT = "hello  world: the quick\nbrown fox, Ünïcödé 世界"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("model") / "model")


def with_tokenizer(model: Path, folder: Path, kind: str, **config: object) -> Checkpoint:
    shutil.copytree(model, folder)
    tokenizer(kind).save_pretrained(folder)
    found = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(found | config))
    return Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("kind", "tokenizer_class"),
    [
        ("metaspace-first", "GPT2Tokenizer"),
        ("metaspace-always", "LlamaTokenizer"),
        ("prepended", "LlamaTokenizer"),
        ("prepended", "Qwen2Tokenizer"),
        ("prepended", "RobertaTokenizer"),
        ("byte-level", "LlamaTokenizer"),
        ("byte-level", "GemmaTokenizer"),
        ("byte-level", "GPT2Tokenizer"),
        ("unigram", "T5Tokenizer"),
        ("unigram", "GPT2Tokenizer"),
        ("word-piece", "BertTokenizer"),
        ("word-piece", "Qwen2Tokenizer"),
    ],
)
def test_texts_are_split_as_tokenizer_json_says(kind: str, tokenizer_class: str, model: Path, tmp_path: Path) -> None:
    loaded = load_tokenizer(with_tokenizer(model, tmp_path / "model", kind, tokenizer_class=tokenizer_class))
    expected = tokenizer(kind)(TEXT, add_special_tokens=False)["input_ids"]
    assert loaded(TEXT, add_special_tokens=False)["input_ids"] == expected
    assert loaded.decode(expected) == tokenizer(kind).decode(expected)


def test_special_tokens_around_a_text_are_those_that_tokenizer_json_says(model: Path, tmp_path: Path) -> None:
    loaded = load_tokenizer(with_tokenizer(model, tmp_path / "model", "prepended", tokenizer_class="GPT2Tokenizer"))
    assert loaded("hello")["input_ids"] == tokenizer("prepended")("hello")["input_ids"]


def test_settings_beside_tokenizer_json_still_count(model: Path, tmp_path: Path) -> None:
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": False}
    loaded = load_tokenizer(with_tokenizer(model, tmp_path / "model", "word-piece", **config))
    assert loaded.tokenize("HELLO") != loaded.tokenize("hello")


def test_a_class_that_cannot_read_the_words_is_refused(model: Path, tmp_path: Path) -> None:
    checkpoint = with_tokenizer(model, tmp_path / "model", "byte-level", tokenizer_class="T5Tokenizer")
    with pytest.raises(InputError, match="the tokenizer cannot be loaded"):
        load_tokenizer(checkpoint)
