"""config.json: wrong types and sizes beyond the tensors are refused at once, by every command that opens a model."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from fedqsn_cli.checkpoint.model_config import check_config
from fedqsn_cli.errors import FormatError
from support.attacks import World, make_world
from support.families import FAMILIES, build
from support.processes import run

WRONG: dict[str, tuple[Any, ...]] = {
    "num_attention_heads": (-4, 0, 10**9),
    "num_hidden_layers": (-1, 10**8, 10**9, 10**30),
    "num_labels": (-1, 10**9),
    "vocab_size": (10**12,),
    "intermediate_size": (10**12,),
    "max_position_embeddings": (10**12,),
    "model_type": (["bert"], {}, 5),
    "architectures": ("Bert", [1], {}),
    "return_dict": (False, "yes"),
    "id2label": (5, {"a": "b"}, []),
    "label2id": ([1], {"a": "b"}),
    "pad_token_id": ("x", 10**30, 1.5),
    "problem_type": (5,),
    "dtype": (5, {}),
    "tie_word_embeddings": ("yes", 1),
    "text_config": (5, {"architectures": 1}, {"num_hidden_layers": 10**9}),
    "quantization_config": ([1], "nf4"),
}
CASES = [(name, value) for name, values in WRONG.items() for value in values]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(("name", "value"), CASES, ids=str)
def test_a_config_that_nothing_can_be_built_by_is_refused_at_once(
    name: str, value: Any, world: World, tmp_path: Path
) -> None:
    model = world.copy("model", tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {name: value}))
    started = time.process_time()
    for words in (("inspect", model), ("evaluate", model, "--data", world.data), world.export(model, tmp_path)):
        ended = run(*words)
        assert (ended.code, len(ended.err.strip().splitlines())) == (2, 1), ended
        assert "config.json" in ended.err
    assert time.process_time() - started < 10
    assert not (tmp_path / "ledger.jsonl").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_of_every_family_is_fine(family: str, tmp_path: Path) -> None:
    for head in FAMILIES[family].heads:
        ended = run("inspect", build(family, tmp_path / head, head=head))
        assert ended.code == 0, ended


REAL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 10_485_760,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "rope_scaling": {"factor": 8.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "vocab_size": 128256,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "pad_token_id": -1,
    "sliding_window": None,
    "text_config": None,
    "torch_dtype": "bfloat16",
}


def test_the_config_of_a_large_model_is_fine() -> None:
    check_config(REAL, {f"layer.{number}": 2 * 4096 * 14336 for number in range(291)}, "config.json")


def test_many_layers_are_fine_where_they_are_there() -> None:
    deep = {"num_hidden_layers": 5000}
    check_config(deep, {f"layer.{number}": 64 for number in range(5000)}, "config.json")
    with pytest.raises(FormatError, match="there are 4999 tensors"):
        check_config(deep, {f"layer.{number}": 64 for number in range(4999)}, "config.json")
