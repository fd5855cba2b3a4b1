"""What of config.json and the tokenizer's files may leave the owner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedqsn_cli.artifacts.sanitize import clean, public_companion, public_config
from fedqsn_cli.errors import FormatError

PATHS = (
    "/home/alice/models/bert",
    "/home/alice/models/",
    "/data/runs/7",
    "/mnt/my disk/model",
    "C:\\models\\bert",
    "c:\\x",
    "~/models/bert",
    "\\\\server\\share\\bert",
    "file:///srv/bert",
    "/a/b",
    "fine-tuned from /home/alice/base on Monday",
    "see /Users/alice/notes.txt",
    "cp /root/x y",
    "in D:\\Users\\alice",
)
PLAIN = ("gelu", "bert", "[CLS]", "/", "/think", "</s>", "a/b", "google/bert_uncased", "3/4", "", "https://a.org/x")


@pytest.mark.parametrize("path", PATHS)
def test_a_field_that_holds_a_path_of_the_owners_machine_is_dropped(path: str) -> None:
    nested = {"a": path, "b": {"c": path, "d": [path, 1, {"e": path}]}, "kept": 1}
    assert clean(nested) == {"b": {"d": [1, {}]}, "kept": 1}


@pytest.mark.parametrize("text", PLAIN)
def test_other_text_stays(text: str) -> None:
    document = {"a": text, "b": [text, {"c": text}]}
    assert clean(document) == document


@pytest.mark.parametrize("name", ["_name_or_path", "name_or_path", "_commit_hash", "vocab_file", "auto_map"])
def test_fields_that_name_an_origin_are_dropped_at_every_depth(name: str) -> None:
    assert clean({name: "bert", "sub": {name: None, "x": [{name: 1}]}}) == {"sub": {"x": [{}]}}


def test_labels_and_tokens_that_look_like_paths_stay() -> None:
    document = {
        "id2label": {"0": "/News/Politics", "1": "/Sports"},
        "label2id": {"/News/Politics": 0, "/Sports": 1},
        "added_tokens_decoder": {"5": {"content": "/a/b"}},
        "chat_template": "/s/{{ x }}",
    }
    assert clean(document) == document


def test_the_config_of_a_proxy_has_the_quantization_of_its_weights_and_no_other() -> None:
    config = {"model_type": "bert", "_name_or_path": "/home/a/b", "quantization_config": {"quant_method": "old"}}
    assert json.loads(public_config(config, None)) == {"model_type": "bert"}
    packed = json.loads(public_config(config, {"quant_method": "bitsandbytes"}))
    assert packed == {"model_type": "bert", "quantization_config": {"quant_method": "bitsandbytes"}}


def test_the_owners_config_is_not_changed() -> None:
    config: dict[str, Any] = {"a": {"_name_or_path": "/x/y"}, "quantization_config": {}}
    public_config(config, {"b": 1})
    assert config == {"a": {"_name_or_path": "/x/y"}, "quantization_config": {}}


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "added_tokens.json"]
)
def test_json_files_next_to_the_model_are_cleaned(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"name_or_path": "/home/alice/x", "pad_token": "[PAD]", "é": 1}', "utf-8")
    assert json.loads(public_companion(tmp_path / name)) == {"pad_token": "[PAD]", "é": 1}


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "tokenizer.model", "chat_template.jinja"])
def test_vocabularies_go_out_byte_for_byte(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\xff\x00 anything")
    assert public_companion(tmp_path / name) == b"\xff\x00 anything"


@pytest.mark.parametrize("text", ["[]", "{", '{"a": 1, "a": 2}', "", '{"a": NaN}'])
def test_a_companion_that_is_not_the_json_it_should_be_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(FormatError):
        public_companion(tmp_path / "tokenizer_config.json")
