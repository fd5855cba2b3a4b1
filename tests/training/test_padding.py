"""What stands beside a text in a batch changes nothing, whatever config and tokenizer say about padding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedqsn_cli import client_train, evaluate, merge
from support.families import EVERY_HEAD, rest_in_soak
from support.training_jobs import data_for, labelled, make_proxy, plain_texts, small_model, write_lines

# Qwen2's own tokenizer class splits words of the tests' word list into nothing; qwen3 stands for it.
HEADS = [(name, head) for name, head in EVERY_HEAD if name != "qwen2"]
DECODERS = [
    (name, head)
    for name, head in HEADS
    if head.endswith("SequenceClassification") and name in ("gpt2", "llama", "opt", "bloom", "falcon", "gpt_neox")
]

PADDED = {  # each way to pad: an encoder, decoders that classify or go on, two towers
    *("BertForSequenceClassification", "LlamaForSequenceClassification", "GPT2LMHeadModel"),
    "T5ForConditionalGeneration",
}


def edit(path: Path, **fields: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    document = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in document.items() if value is not None}))


def data_of(head: str, folder: Path) -> Path:
    """Data of texts of different lengths."""
    if head.endswith("ConditionalGeneration"):
        texts = [" ".join(f"w{3 + (row + step) % 90}" for step in range(1 + row % 5)) for row in range(9)]
        return write_lines(folder / "pairs.jsonl", [{"source": text, "target": text[::-1]} for text in texts])
    return data_for(head, folder)


def losses(model: Path, data: Path) -> list[float]:
    return [evaluate(model, data=data, batch_size=size, device="cpu").loss for size in (1, 3, 32)]


@pytest.mark.parametrize(("name", "head"), rest_in_soak(HEADS, PADDED))
def test_the_size_of_batches_changes_no_loss(tmp_path: Path, name: str, head: str) -> None:
    model = small_model(tmp_path / "model", name, head=head)
    edit(model / "tokenizer_config.json", mask_token="w96")
    one, some, all_of_them = losses(model, data_of(head, tmp_path))
    assert some == pytest.approx(one, rel=2e-5) and all_of_them == pytest.approx(one, rel=2e-5)


@pytest.mark.parametrize("pad", [-1, 7, 1])
@pytest.mark.parametrize(("name", "head"), rest_in_soak(DECODERS))
def test_another_padding_id_in_the_config_changes_nothing(tmp_path: Path, name: str, head: str, pad: int) -> None:
    model, data = small_model(tmp_path / "model", name, head=head), labelled(tmp_path / "data.jsonl")
    expected = losses(model, data)[0]
    edit(model / "config.json", pad_token_id=pad)
    assert losses(model, data) == pytest.approx([expected] * 3, rel=2e-5)


@pytest.mark.parametrize(
    ("name", "head"), rest_in_soak([*DECODERS, ("llama", "LlamaForCausalLM"), ("gpt2", "GPT2LMHeadModel")])
)
def test_a_tokenizer_without_padding_and_end_is_enough(tmp_path: Path, name: str, head: str) -> None:
    model, data = small_model(tmp_path / "model", name, head=head), data_for(head, tmp_path)
    expected = losses(model, data)[0]
    edit(model / "tokenizer_config.json", pad_token=None, eos_token=None)
    (model / "special_tokens_map.json").unlink(missing_ok=True)
    edit(model / "config.json", pad_token_id=None, eos_token_id=None)
    assert losses(model, data) == pytest.approx([expected] * 3, rel=2e-5)


def test_a_decoder_that_classifies_is_trained_alike_whatever_the_config_pads_with(tmp_path: Path) -> None:
    updates = []
    for pad in (0, 7):
        where = tmp_path / str(pad)
        where.mkdir()
        model = small_model(where / "model", "llama", head="LlamaForSequenceClassification")
        edit(model / "config.json", pad_token_id=pad)
        proxy = make_proxy(model, where / "proxy", key=tmp_path / "key")
        data = labelled(where / "data.jsonl")
        client_train(proxy, where / "update", data=data, max_steps=2, batch_size=8, device="cpu", precision="fp32")
        updates.append(load_file(where / "update" / "update.safetensors"))
    assert all(torch.allclose(updates[0][name], updates[1][name], atol=1e-6) for name in updates[0])


def test_adapters_are_trained_alike_whatever_the_tokenizer_says_about_padding(tmp_path: Path) -> None:
    """On a model with grouped attention whose head is its embedding."""
    data, factors = plain_texts(tmp_path / "data.jsonl"), []
    for number, said in enumerate(({}, {"padding_side": "left"}, {"pad_token": None})):
        where = tmp_path / str(number)
        model = small_model(where / "model", "llama", tie_word_embeddings=True, num_key_value_heads=2)
        edit(model / "tokenizer_config.json", **said)
        edit(model / "config.json", pad_token_id=None if "pad_token" in said else 0)
        proxy = make_proxy(model, where / "proxy", key=tmp_path / "key", format="nf4")
        given: dict[str, Any] = {"max_steps": 2, "batch_size": 8, "device": "cpu", "precision": "fp32"}
        client_train(proxy, where / "update", data=data, method="lora", lora_r=4, **given)
        factors.append(load_file(where / "update" / "adapter_model.safetensors"))
    assert any(bool(factor.any()) for name, factor in factors[0].items() if "lora_B" in name)
    for others in factors[1:]:
        assert others.keys() == factors[0].keys()
        assert all(torch.allclose(others[name], factor, atol=1e-6) for name, factor in factors[0].items())
    merge(model, [where / "update"], tmp_path / "next", key=tmp_path / "key", ledger=where / "proxy.jsonl")
    assert evaluate(tmp_path / "next", data=data).loss != evaluate(model, data=data).loss


@pytest.mark.parametrize("method", ["full", "lora"])
def test_buffers_of_old_checkpoints_are_no_error_for_anybody(tmp_path: Path, method: str) -> None:
    """Early checkpoints of GPT-2, GPT-J and GPT-Neo hold causal masks, one of which has no dimension."""
    model = small_model(tmp_path / "model", "gpt2")
    tensors = load_file(model / "model.safetensors")
    for layer in range(2):
        tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    proxy, data = make_proxy(model, tmp_path / "proxy"), plain_texts(tmp_path / "data.jsonl")
    client_train(proxy, tmp_path / "update", data=data, max_steps=1, method=method)
    merge(model, [tmp_path / "update"], tmp_path / "next", key=tmp_path / "key", ledger=tmp_path / "proxy.jsonl")
    assert evaluate(tmp_path / "next", data=data).loss > 0 and evaluate(proxy, data=data).loss > 0
    assert load_file(tmp_path / "next" / "model.safetensors").keys() == tensors.keys()
