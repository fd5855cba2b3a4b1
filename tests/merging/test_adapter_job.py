"""A job in which clients train adapters: three rounds, from the proxy to the next model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from fedqsn_cli import client_train, export_proxy, inspect, merge
from fedqsn_cli.artifacts.manifests import UpdateManifest, read_manifest
from support.helpers import hidden_elements, visible_elements
from support.training_jobs import data_for, dense_tensors, small_model, whole_update

Doubles = NDArray[np.float64]


def own_step(proxy: Path, update: Path) -> dict[str, Doubles]:
    """s Δ of a client by the definition, from its files alone: scaling · B A, and U of what was trained in full."""
    manifest = read_manifest(update, UpdateManifest)
    if manifest.adapters is None:
        return {name: u.double().numpy() for name, u in whole_update(proxy, update).items()}
    factors = load_file(update / "adapter_model.safetensors")
    steps = {name: np.zeros(tuple(tensor.shape)) for name, tensor in dense_tensors(proxy).items()}
    for name, adapter in manifest.adapters.items():
        a, b = (factors[f"{adapter.module}.lora_{letter}.weight"].double().numpy() for letter in "AB")
        steps[name] = adapter.scaling * (b @ a).T if adapter.transposed else adapter.scaling * (b @ a)
    for name, inside in (manifest.saved or {}).items():
        steps[name] = factors[inside].double().numpy() - dense_tensors(proxy)[name].double().numpy()
    return steps


@pytest.mark.parametrize(("family", "head"), [("gpt2", ""), ("roberta", "RobertaForSequenceClassification")])
def test_after_three_rounds_the_model_is_the_first_one_plus_the_means_of_the_clients_products(
    tmp_path: Path, family: str, head: str
) -> None:
    model, data = small_model(tmp_path / "model", family, head=head or None), data_for(head, tmp_path)
    job = {"key": tmp_path / "key", "ledger": tmp_path / "ledger.jsonl"}
    usual = {"data": data, "max_steps": 2, "batch_size": 4, "lr": 2e-2, "precision": "fp32"}
    methods = {"ann": {"method": "lora", "lora_r": 2}, "bob": {"method": "lora", "lora_r": 5, "lora_dropout": 0.1}}
    now = model
    for number in (1, 2, 3):
        if number == 3:
            methods["bob"] = {}  # a full update in the same round
        proxies, updates = tmp_path / f"proxies-{number}", []
        export_proxy(
            str(now), proxies / "{client}", client=list(methods), round=number, p1=0.3, p2=0.2, format="nf4", **job
        )
        for name, options in methods.items():
            client_train(proxies / name, tmp_path / f"u{number}-{name}", **usual | options)
            updates.append(tmp_path / f"u{number}-{name}")
        merge(str(now), updates, tmp_path / f"model-{number}", **job)
        before, after = dense_tensors(now), dense_tensors(tmp_path / f"model-{number}")
        hidden = hidden_elements(now, tmp_path / "key")
        total = {name: np.zeros(tuple(tensor.shape)) for name, tensor in before.items()}
        weight = {name: np.zeros(tuple(tensor.shape)) for name, tensor in before.items()}
        for name, update in zip(methods, updates, strict=True):
            examples = read_manifest(update, UpdateManifest).num_examples
            shown = visible_elements(proxies / name)
            for tensor, step in own_step(proxies / name, update).items():
                flags = shown[tensor].reshape(step.shape) if tensor in shown else np.ones(step.shape, np.bool_)
                assert not step[~flags].any()
                total[tensor] += examples * step / (flags.size / flags.sum())
                weight[tensor] += examples * flags
        for tensor, old in before.items():
            mean = total[tensor] / np.maximum(weight[tensor], 1)
            result = after[tensor].numpy()
            np.testing.assert_allclose(result, old.double().numpy() + mean, rtol=2e-7, atol=1e-8)
            np.testing.assert_array_equal(result[hidden[tensor]], old.numpy()[hidden[tensor]])
        assert any((total[tensor] != 0).any() for tensor in before)
        now = tmp_path / f"model-{number}"


def test_peft_opens_a_kept_adapter_and_computes_what_the_merged_model_computes(tmp_path: Path) -> None:
    model, data = small_model(tmp_path / "model", "gpt2"), data_for("", tmp_path)
    job = {"key": tmp_path / "key", "ledger": tmp_path / "ledger.jsonl"}
    export_proxy(str(model), tmp_path / "proxy", client=["ann"], round=1, p1=0.3, p2=0.2, format="nf4", **job)
    client_train(tmp_path / "proxy", tmp_path / "u", data=data, max_steps=2, lr=2e-2, method="lora", lora_r=3)
    merge(str(model), [tmp_path / "u"], tmp_path / "next", keep_adapter=tmp_path / "adapter", **job)
    ids = torch.tensor([[5, 8, 13, 21]])
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(model), str(tmp_path / "adapter"))
        wanted = GPT2LMHeadModel.from_pretrained(tmp_path / "next").eval()(ids).logits
        torch.testing.assert_close(adapted.eval()(ids).logits, wanted, rtol=1e-5, atol=1e-5)
        assert not torch.equal(wanted, GPT2LMHeadModel.from_pretrained(model).eval()(ids).logits)


def test_inspect_counts_the_adapters_of_an_update(tmp_path: Path) -> None:
    head = "RobertaForSequenceClassification"
    model, data = small_model(tmp_path / "model", "roberta", head=head), data_for(head, tmp_path)
    export_proxy(
        str(model),
        tmp_path / "proxy",
        client=["ann"],
        round=1,
        p1=0.1,
        p2=0.1,
        key=tmp_path / "key",
        ledger=tmp_path / "l.jsonl",
    )
    client_train(tmp_path / "proxy", tmp_path / "u", data=data, max_steps=1, method="lora", lora_r=3)
    found = inspect(str(tmp_path / "u"))
    assert (found.facts["ranks"], found.facts["trained_in_full"]) == (
        [3],
        ["classifier.out_proj.bias", "classifier.out_proj.weight"],
    )
    assert found.facts["adapters"] == len(read_manifest(tmp_path / "u", UpdateManifest).adapters or {})
    assert found.contents is not None
    assert found.contents.tensors == sum(len(load_file(path)) for path in (tmp_path / "u").glob("*.safetensors"))
