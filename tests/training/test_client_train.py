"""`client_train`: what it writes, what it refuses, and that it leaves nothing else behind."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file

from fedqsn_cli import client_train, evaluate
from fedqsn_cli.artifacts.manifests import UpdateManifest, file_digest, read_manifest
from fedqsn_cli.checkpoint import Checkpoint
from fedqsn_cli.errors import DataError, FormatError, InputError, OutputExists
from fedqsn_cli.models.architecture import task_of
from fedqsn_cli.models.tokenizer import load_tokenizer
from fedqsn_cli.models.torch_model import Loaded, build_model
from fedqsn_cli.progress import Silent
from fedqsn_cli.training.data.encoder import Encoder
from fedqsn_cli.training.scoring.scoring import score
from support.families import EVERY_HEAD, rest_in_soak
from support.helpers import HOST, USER, set_host_names
from support.tables import read_table
from support.training_jobs import (
    data_for,
    dense_tensors,
    labelled,
    make_proxy,
    plain_texts,
    small_model,
    visible_units,
    whole_update,
    write_lines,
)

FAST = {"max_steps": 3, "batch_size": 4, "lr": 1e-2}

# Qwen2's own tokenizer class splits words of the tests' word list into nothing; qwen3 stands for it.
TRAINABLE = [
    (name, head)
    for name, head in EVERY_HEAD
    if not head.endswith(("MaskedLM", "ConditionalGeneration")) and name != "qwen2"
]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, proxy/ and data.jsonl of a BERT classifier, not to be changed."""
    set_host_names = tmp_path_factory.mktemp("bert")
    make_proxy(small_model(set_host_names / "model"), set_host_names / "proxy")
    labelled(set_host_names / "data.jsonl")
    return set_host_names


def loss_of(proxy: Path, tensors: dict[str, torch.Tensor], data: Path) -> float:
    """Loss of a model with these tensors in place of the proxy's."""
    with Checkpoint.open(proxy) as checkpoint:
        model = build_model(checkpoint.config or {}, tensors, where=proxy)
        loaded = Loaded(model, load_tokenizer(checkpoint), task_of(checkpoint.config, proxy)[0])
    encoder = Encoder.of(loaded, 256)
    examples = encoder.encode(read_table(data), Silent())
    return score(model, examples, batch_size=8, padding=encoder.padding, progress=Silent()).loss


@pytest.mark.parametrize(("name", "head"), rest_in_soak(TRAINABLE))
def test_the_proxy_plus_the_update_is_the_model_that_was_trained(tmp_path: Path, name: str, head: str) -> None:
    proxy = make_proxy(small_model(tmp_path / "model", name, head=head), tmp_path / "proxy")
    data = data_for(head, tmp_path)
    result = client_train(proxy, tmp_path / "update", data=data, eval_data=data, **FAST)
    update, dense = whole_update(proxy, tmp_path / "update"), dense_tensors(proxy)
    assert result.before is not None and result.after is not None
    assert result.after.loss != pytest.approx(result.before.loss, abs=1e-4)
    assert loss_of(proxy, dense, data) == pytest.approx(result.before.loss, abs=1e-5)
    assert loss_of(proxy, {name: dense[name] + update[name] for name in dense}, data) == pytest.approx(
        result.after.loss, abs=1e-4
    )
    assert all(values.any() for name, values in update.items() if not name.endswith("e_score_correction_bias"))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", {"format": "nf4"}),
        ("gpt2", {"format": "nf4", "double_quant": True}),
        ("bert", {"format": "int8"}),
        ("bert", {"format": "fp4", "layout": "dense"}),
        ("bert", {"format": "nf3"}),
        ("gpt2", {"axis": "input"}),
        ("gpt_oss", {"axis": "element"}),
        ("mixtral", {"axis": "element", "format": "nf2"}),
    ],
)
def test_quantized_proxies_and_other_axes_are_trained_alike(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    model = small_model(tmp_path / "model", name, dtype="bfloat16")
    proxy = make_proxy(model, tmp_path / "proxy", **options)
    data = data_for("Classification" if name == "bert" else "", tmp_path)
    result = client_train(proxy, tmp_path / "update", data=data, eval_data=data, **FAST)
    update, dense = whole_update(proxy, tmp_path / "update"), dense_tensors(proxy)
    assert result.after is not None
    trained = {name: dense[name].float() + update[name] for name in dense}
    assert loss_of(proxy, trained, data) == pytest.approx(result.after.loss, abs=1e-4)


def test_training_learns(bert: Path, tmp_path: Path) -> None:
    data = bert / "data.jsonl"
    result = client_train(bert / "proxy", tmp_path / "update", data=data, eval_data=data, epochs=20, lr=3e-3)
    assert result.before is not None and result.after is not None
    assert result.after.accuracy == 1.0
    assert result.last_loss < result.first_loss < 2
    assert result.after == evaluate_update(bert, tmp_path / "update", data, result.after.loss)


def evaluate_update(bert: Path, update: Path, data: Path, expected: float) -> Any:
    """The evaluation that client_train reported, after its loss was found again from the files."""
    from fedqsn_cli.training.scoring.scoring import Evaluation

    dense, change = dense_tensors(bert / "proxy"), whole_update(bert / "proxy", update)
    loss = loss_of(bert / "proxy", {name: dense[name] + change[name] for name in dense}, data)
    assert loss == pytest.approx(expected, abs=1e-5)
    return Evaluation("classification", 24, expected, 1.0, 1.0, None, mcc=1.0)


def test_shapes_hold_visible_units_only_and_the_manifest_says_what_was_done(bert: Path, tmp_path: Path) -> None:
    result = client_train(bert / "proxy", tmp_path / "update", data=bert / "data.jsonl", batch_size=10, seed=3)
    stored = load_file(tmp_path / "update" / "update.safetensors")
    visible = visible_units(bert / "proxy")
    for name, tensor in dense_tensors(bert / "proxy").items():
        if name not in visible:
            assert stored[name].shape == tensor.shape
        else:
            mask = visible[name]
            axis = 0 if mask.axis == "row" else 1
            expected = list(tensor.shape)
            expected[axis] = int(mask.flags.sum())
            assert list(stored[name].shape) == expected
            assert expected[axis] < tensor.shape[axis]
    assert result.parameters == sum(tensor.numel() for tensor in stored.values())
    manifest = read_manifest(tmp_path / "update", UpdateManifest)
    assert manifest.proxy_sha256 == file_digest(bert / "proxy" / "proxy.json")
    content = (tmp_path / "update" / "update.safetensors").read_bytes()
    assert manifest.files == {"update.safetensors": f"blake3:{blake3(content).hexdigest()}"}
    assert (manifest.num_examples, manifest.steps, manifest.precision) == (24, 3, "fp32")
    assert (manifest.losses.first, manifest.losses.eval_before) == (result.first_loss, None)
    assert sorted(path.name for path in (tmp_path / "update").iterdir()) == ["update.json", "update.safetensors"]


def test_the_same_seed_gives_the_same_bytes_wherever_it_runs(bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert / "proxy", tmp_path / "elsewhere")
    shutil.copy(bert / "data.jsonl", tmp_path / "other-name.jsonl")
    client_train(bert / "proxy", tmp_path / "first", data=bert / "data.jsonl", seed=5, **FAST)
    client_train(tmp_path / "elsewhere", tmp_path / "second", data=tmp_path / "other-name.jsonl", seed=5, **FAST)
    client_train(bert / "proxy", tmp_path / "third", data=bert / "data.jsonl", seed=6, **FAST)
    for name in ("update.json", "update.safetensors"):
        first = (tmp_path / "first" / name).read_bytes()
        assert (tmp_path / "second" / name).read_bytes() == first
        assert (tmp_path / "third" / name).read_bytes() != first


def test_an_update_says_nothing_about_where_and_by_whom_it_was_made(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_host_names(monkeypatch)
    client_train(bert / "proxy", tmp_path / "update", data=bert / "data.jsonl", **FAST)
    stored = (tmp_path / "update" / "update.safetensors").read_bytes()
    header = stored[8 : 8 + int.from_bytes(stored[:8], "little")]
    words = {part for text in (header, (tmp_path / "update" / "update.json").read_bytes()) for part in text.split(b'"')}
    secrets = {str(tmp_path), str(bert), "data.jsonl", "proxy", HOST, USER}
    assert not words & {secret.encode() for secret in secrets}
    assert not any(str(place).encode() in word for word in words for place in (tmp_path, bert))


@pytest.mark.parametrize(("form", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_smaller_formats_are_the_fp32_update_rounded_once(bert: Path, tmp_path: Path, form: str, dtype: Any) -> None:
    for name in ("fp32", form):
        client_train(bert / "proxy", tmp_path / name, data=bert / "data.jsonl", update_format=name, **FAST)
    full = load_file(tmp_path / "fp32" / "update.safetensors")
    small = load_file(tmp_path / form / "update.safetensors")
    assert all(torch.equal(small[name], full[name].to(dtype)) for name in full)
    assert read_manifest(tmp_path / form, UpdateManifest).precision == form


@pytest.mark.parametrize("name", ["model.safetensors", "visible.safetensors", "config.json", "tokenizer.json"])
def test_a_proxy_with_a_changed_or_missing_file_is_refused(bert: Path, tmp_path: Path, name: str) -> None:
    proxy = tmp_path / "proxy"
    shutil.copytree(bert / "proxy", proxy)
    content = bytearray((proxy / name).read_bytes())
    content[-2] ^= 1
    (proxy / name).write_bytes(content)
    with pytest.raises(FormatError, match=rf"{name}: is not the file that proxy.json lists"):
        client_train(proxy, tmp_path / "update", data=bert / "data.jsonl", **FAST)
    (proxy / name).unlink()
    with pytest.raises(FormatError, match=rf"{name}: is missing"):
        client_train(proxy, tmp_path / "update", data=bert / "data.jsonl", **FAST)
    assert [path.name for path in tmp_path.iterdir()] == ["proxy"]


def test_files_that_were_added_to_a_proxy_are_refused_where_they_would_be_used(bert: Path, tmp_path: Path) -> None:
    proxy = tmp_path / "proxy"
    shutil.copytree(bert / "proxy", proxy)
    (proxy / "README.md").write_text("harmless")
    client_train(proxy, tmp_path / "update", data=bert / "data.jsonl", **FAST)
    (proxy / "added_tokens.json").write_text("{}")
    with pytest.raises(FormatError, match=r"added_tokens.json: is not listed"):
        client_train(proxy, tmp_path / "other", data=bert / "data.jsonl", **FAST)


def test_a_model_that_is_not_a_proxy_is_refused(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="export-proxy"):
        client_train(bert / "model", tmp_path / "update", data=bert / "data.jsonl")


def test_nothing_is_left_when_the_data_is_bad_or_the_output_taken(bert: Path, tmp_path: Path) -> None:
    bad = write_lines(tmp_path / "bad.jsonl", [{"text": "w5", "label": 99}])
    with pytest.raises(DataError, match="label 99 is out of range"):
        client_train(bert / "proxy", tmp_path / "new" / "update", data=bad)
    with pytest.raises(DataError, match="label 99 is out of range"):
        client_train(bert / "proxy", tmp_path / "update", data=bert / "data.jsonl", eval_data=bad)
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputExists):
        client_train(bert / "proxy", tmp_path / "taken", data=bert / "data.jsonl", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "taken"]


def test_an_update_is_replaced_when_forced(bert: Path, tmp_path: Path) -> None:
    client_train(bert / "proxy", tmp_path / "update", data=bert / "data.jsonl", seed=1, **FAST)
    before = (tmp_path / "update" / "update.safetensors").read_bytes()
    with pytest.raises(OutputExists):
        client_train(bert / "proxy", tmp_path / "update", data=bert / "data.jsonl", seed=2, **FAST)
    client_train(bert / "proxy", tmp_path / "update", data=bert / "data.jsonl", seed=2, force=True, **FAST)
    assert (tmp_path / "update" / "update.safetensors").read_bytes() != before


def test_an_interrupted_training_leaves_nothing(bert: Path, tmp_path: Path) -> None:
    class Impatient(Silent):
        def advance(self, amount: int, **figures: float) -> None:
            if "loss" in figures:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client_train(bert / "proxy", tmp_path / "update", data=bert / "data.jsonl", progress=Impatient(), **FAST)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("epochs", 0),
        ("lr", -1e-5),
        ("lr", float("nan")),
        ("batch_size", 0),
        ("max_length", 0),
        ("seed", -1),
        ("weight_decay", -0.1),
        ("warmup_ratio", 1.5),
        ("max_grad_norm", 0),
        ("gradient_accumulation", 0),
        ("max_steps", 0),
        ("precision", "fp16"),
        ("update_format", "int4"),
        ("device", "tpu"),
        ("device", "cuda:99"),
    ],
)
def test_options_out_of_range_are_refused_by_name(bert: Path, tmp_path: Path, option: str, value: Any) -> None:
    with pytest.raises(InputError, match="--" + option.replace("_", "-")):
        client_train(bert / "proxy", tmp_path / "update", data=bert / "data.jsonl", **{option: value})
    assert not list(tmp_path.iterdir())


def test_nothing_is_printed_and_nothing_is_fetched(
    bert: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("somebody asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    client_train(bert / "proxy", tmp_path / "update", data=bert / "data.jsonl", eval_data=bert / "data.jsonl", **FAST)
    evaluate(bert / "model", data=bert / "data.jsonl")
    assert capfd.readouterr() == ("", "")
    assert not list(Path(os.environ["HF_HOME"]).rglob("*"))


def test_checkpoints_without_the_base_models_prefix_are_trained_under_their_own_names(tmp_path: Path) -> None:
    """The first GPT-2 checkpoints name their tensors wte.weight, h.0..., and carry causal masks along."""
    from safetensors.torch import save_file

    model = small_model(tmp_path / "model", "gpt2")
    tensors = load_file(model / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    proxy = make_proxy(model, tmp_path / "proxy")
    client_train(proxy, tmp_path / "update", data=plain_texts(tmp_path / "data.jsonl"), **FAST)
    stored = load_file(tmp_path / "update" / "update.safetensors")
    assert set(stored) == set(tensors)
    assert stored["wte.weight"].any() and not stored["h.0.attn.bias"].any()


def test_update_json_has_no_field_beyond_these(bert: Path, tmp_path: Path) -> None:
    client_train(bert / "proxy", tmp_path / "update", data=bert / "data.jsonl", **FAST)
    document = json.loads((tmp_path / "update" / "update.json").read_text())
    assert sorted(document) == [
        "files",
        "format",
        "losses",
        "num_examples",
        "precision",
        "proxy_id",
        "proxy_sha256",
        "steps",
        "tool",
    ]
    assert os.stat(tmp_path / "update" / "update.json").st_nlink == 1
