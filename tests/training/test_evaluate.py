"""`evaluate` against arithmetic done by hand, on every kind of model that a job knows."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from fedqsn_cli import evaluate, mask, quantize
from fedqsn_cli.errors import DataError, FormatError, InputError
from fedqsn_cli.training.data.metrics import of_classes
from fedqsn_cli.training.scoring.one_by_one import OneByOne
from support.keys import known_key
from support.training_jobs import labelled, make_proxy, plain_texts, small_model, write_lines


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/ and data.jsonl of a BERT classifier."""
    here = tmp_path_factory.mktemp("bert")
    small_model(here / "model")
    labelled(here / "data.jsonl", rows=50)
    return here


def test_a_classifier_is_measured_as_transformers_would(bert: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(bert / "model")
    tokenizer = AutoTokenizer.from_pretrained(bert / "model")
    rows = [json.loads(line) for line in (bert / "data.jsonl").read_text().splitlines()]
    losses, right = [], 0
    for row in rows:
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], return_tensors="pt")).logits
        losses.append(functional.cross_entropy(logits, torch.tensor([row["label"]])).item())
        right += int(logits.argmax()) == row["label"]
    result = evaluate(bert / "model", data=bert / "data.jsonl")
    assert result.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert result.accuracy == right / len(rows)
    assert (result.task, result.examples, result.perplexity) == ("classification", 50, None)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_perplexity_weighs_tokens_and_not_texts(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, data = small_model(tmp_path / "model", name), plain_texts(tmp_path / "data.jsonl", rows=9)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for line in data.read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"], return_tensors="pt").input_ids
        with torch.no_grad():
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    result = evaluate(folder, data=data, batch_size=4)
    assert result.loss == pytest.approx(total / count, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert (result.task, result.accuracy, result.macro_f1) == ("causal-lm", None, None)


def test_the_size_of_batches_changes_nothing(bert: Path) -> None:
    results = [evaluate(bert / "model", data=bert / "data.jsonl", batch_size=size) for size in (1, 7, 64)]
    assert results[0] == results[1] == results[2]  # to the last bit


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_size_of_batches_does_not_change_a_language_model(tmp_path: Path, name: str) -> None:
    folder, data = small_model(tmp_path / "model", name), plain_texts(tmp_path / "data.jsonl", rows=9)
    one, many = (evaluate(folder, data=data, batch_size=size) for size in (1, 9))
    assert one == many


def test_a_decoder_with_a_classification_head_does_not_look_at_padding(tmp_path: Path) -> None:
    folder, data = small_model(tmp_path / "model", "llama", head="LlamaForSequenceClassification"), tmp_path / "d.jsonl"
    labelled(data)
    one, many = (evaluate(folder, data=data, batch_size=size) for size in (1, 16))
    assert one == many


@pytest.mark.parametrize(
    ("truths", "answers", "expected"),
    [
        ([0, 1, 2], [0, 1, 2], 1.0),
        ([0, 0, 1, 1], [0, 1, 1, 1], (2 / 3 + 4 / 5) / 2),
        ([0, 0], [1, 1], 0.0),
        ([0, 0, 0, 3], [0, 0, 0, 0], (6 / 7 + 0) / 2),
    ],
)
def test_macro_f1_is_the_mean_over_classes_that_occur(truths: list[int], answers: list[int], expected: float) -> None:
    assert of_classes(truths, answers, [])["macro_f1"] == pytest.approx(expected)


def test_a_server_model_a_quantized_one_and_a_proxy_that_hides_no_more_agree(bert: Path, tmp_path: Path) -> None:
    data, key = bert / "data.jsonl", tmp_path / "key"
    with known_key():  # with some masks the losses of model and server model agree in four digits
        mask(str(bert / "model"), tmp_path / "server", key=key, p1=0.3)
    quantize(str(tmp_path / "server"), tmp_path / "packed", format="nf4")
    plain = make_proxy(tmp_path / "server", tmp_path / "plain", p1=0.3, p2=0.0, key=key)
    packed = make_proxy(tmp_path / "server", tmp_path / "proxy", p1=0.3, p2=0.0, key=key, format="nf4")
    server = evaluate(tmp_path / "server", data=data)
    assert evaluate(plain, data=data) == server
    assert evaluate(packed, data=data).loss == pytest.approx(evaluate(tmp_path / "packed", data=data).loss, rel=1e-4)
    assert evaluate(bert / "model", data=data).loss != pytest.approx(server.loss, rel=1e-4)


def test_a_proxy_whose_files_were_changed_is_refused(bert: Path, tmp_path: Path) -> None:
    proxy = make_proxy(bert / "model", tmp_path / "proxy")
    (proxy / "config.json").write_text((proxy / "config.json").read_text() + "\n")
    with pytest.raises(FormatError, match="config.json: is not the file"):
        evaluate(proxy, data=bert / "data.jsonl")


def test_weights_that_are_not_numbers_are_named_as_the_cause(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = small_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.weight"][:] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="the model's loss is nan"):
        evaluate(folder, data=labelled(tmp_path / "data.jsonl"))


def test_bad_data_and_options_are_refused(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column 'label' is missing"):
        evaluate(bert / "model", data=write_lines(tmp_path / "data.jsonl", [{"text": "w5"}]))
    with pytest.raises(InputError, match="--batch-size"):
        evaluate(bert / "model", data=bert / "data.jsonl", batch_size=0)


def test_layers_that_get_nothing_of_a_short_text_are_computed_as_they_are() -> None:
    with OneByOne(3):
        assert functional.linear(torch.ones(3, 0, 4), torch.ones(5, 4)).shape == (3, 0, 5)
