"""Packed texts are trained as texts of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedqsn_cli import client_train
from fedqsn_cli.errors import InputError
from fedqsn_cli.options import RecipeOptions
from fedqsn_cli.progress import SILENT
from fedqsn_cli.training.steps import loop
from fedqsn_cli.training.steps.batching import IGNORED, Examples, Padding
from fedqsn_cli.training.steps.compact import VisibleParameters
from fedqsn_cli.training.steps.packing import check_separation, packed
from support.families import make_config
from support.training_jobs import labelled, make_proxy, plain_texts, small_model


def texts(lengths: list[int]) -> Examples:
    """Texts of different tokens; the first target of each counts for nothing."""
    ids = [[3 + (11 * number + place) % 90 for place in range(length)] for number, length in enumerate(lengths)]
    features = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids]
    return Examples("causal-lm", features, [[IGNORED, *row[1:]] for row in ids])


def new_model(name: str) -> Any:
    import transformers

    torch.manual_seed(0)
    dropout = {} if name == "llama" else {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = make_config(name, **dropout)
    return getattr(transformers, config.architectures[0])(config)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=30))
def test_every_text_is_in_one_row_and_no_row_is_too_long(lengths: list[int]) -> None:
    examples = texts(lengths)
    rows = packed(examples, 12)
    assert max(rows.lengths) <= 12
    assert rows.texts_in(range(len(rows))) == len(lengths)
    found = []
    for feature, targets in zip(rows.features, rows.targets, strict=True):
        starts = [place for place, position in enumerate(feature["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(feature["input_ids"])], strict=True):
            text = feature["input_ids"][start:end]
            found.append(text)
            assert feature["position_ids"][start:end] == list(range(len(text)))
            assert targets[start:end] == [IGNORED, *text[1:]]  # type: ignore[index]
    assert sorted(found) == sorted(feature["input_ids"] for feature in examples.features)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_packed_batch_takes_the_step_of_its_texts(name: str) -> None:
    examples = texts([9, 4, 7, 5, 3, 8, 2])
    rows = packed(examples, 12)
    assert len(rows) < len(examples)
    results = []
    for data in (examples, rows):
        model = new_model(name)
        recipe = RecipeOptions(batch_size=len(data), lr=1e-2, epochs=3)
        done = loop.train(model, data, VisibleParameters(model, {}), recipe, Padding(0), SILENT)
        assert done.examples == 7
        results.append((done.first_loss, done.last_loss))
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_a_model_that_does_not_heed_positions_is_refused() -> None:
    model = new_model("llama")
    check_separation(model)
    forward = model.forward
    model.forward = lambda input_ids, position_ids, use_cache: forward(input_ids=input_ids, use_cache=use_cache)
    with pytest.raises(InputError, match="--packing: texts in one row would see each other with LlamaForCausalLM"):
        check_separation(model)


def test_client_train_counts_texts_and_refuses_other_tasks(tmp_path: Path) -> None:
    proxy = make_proxy(small_model(tmp_path / "model", "llama"), tmp_path / "proxy")
    data = plain_texts(tmp_path / "texts.jsonl", rows=12)
    result = client_train(proxy, tmp_path / "update", data=data, packing=True, max_length=24, batch_size=2)
    assert result.examples == 12
    assert result.steps < 6
    (tmp_path / "other").mkdir()
    proxy = make_proxy(small_model(tmp_path / "other" / "model"), tmp_path / "other" / "proxy")
    with pytest.raises(InputError, match="--packing: is for causal language models"):
        client_train(proxy, tmp_path / "no", data=labelled(tmp_path / "data.jsonl"), packing=True)
