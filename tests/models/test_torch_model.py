"""From a checkpoint to a model and back: packed weights, server models, odd names, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fedqsn_cli import mask, quantize
from fedqsn_cli.checkpoint import Checkpoint
from fedqsn_cli.errors import FormatError, InputError
from fedqsn_cli.models.tokenizer import load_tokenizer
from fedqsn_cli.models.torch_model import Loaded, build_model, choose_device, load_dense, load_model, stored_tensors
from support.families import EVERY_HEAD, build
from support.hardware import unpacked_weights
from support.training_jobs import dense_tensors, make_proxy, small_model


def load(folder: Path, **options: Any) -> Any:
    with Checkpoint.open(folder) as checkpoint:
        return load_model(checkpoint, **options)


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("name", "head"), EVERY_HEAD)
def test_every_tensor_of_every_family_comes_back_as_it_went_in(tmp_path: Path, name: str, head: str) -> None:
    folder = build(name, tmp_path / "model", head=head)
    dense = dense_tensors(folder)
    assert {name: tuple(tensor.shape) for name, tensor in dense.items()} == {
        name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()
    }
    model = build_model(json.loads((folder / "config.json").read_text()), dense, where=folder)
    back = stored_tensors(model, dense)
    assert set(back) == set(dense)
    assert all(torch.equal(back[name], dense[name]) for name in dense)


def test_16_bit_weights_are_computed_with_in_fp32(tmp_path: Path) -> None:
    folder = build("bert", tmp_path / "model", dtype="bfloat16", max_shard_size="50KB")
    loaded = load(folder)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert {tensor.dtype for tensor in dense_tensors(folder).values()} == {torch.bfloat16}
    assert loaded.task == "classification" and loaded.tokenizer is None and not loaded.model.training


@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    [
        ("bert", "bfloat16", {"format": "nf4"}),
        ("gpt2", "float32", {"format": "nf4", "double_quant": True}),
        ("gpt2", "float16", {"format": "fp4", "block_size": 128}),
        ("opt", "float16", {"format": "int8"}),
    ],
)
def test_packed_weights_are_what_bitsandbytes_computes_with(
    tmp_path: Path, name: str, dtype: str, options: dict[str, Any]
) -> None:
    """The oracle: transformers loads the same proxy and bitsandbytes unpacks it."""
    import transformers
    from transformers.pytorch_utils import Conv1D

    proxy = make_proxy(build(name, tmp_path / "model", dtype=dtype), tmp_path / "proxy", **options)
    dense = dense_tensors(proxy)
    head = json.loads((proxy / "config.json").read_text())["architectures"][0]
    theirs = getattr(transformers, head).from_pretrained(proxy)
    original = {module for module, kind in build_model_modules(tmp_path / "model").items() if isinstance(kind, Conv1D)}
    compared = 0
    for module, expected in unpacked_weights(theirs):
        expected = expected.t() if module in original else expected
        assert torch.equal(dense[f"{module}.weight"], expected.to(getattr(torch, dtype))), module
        compared += 1
    assert compared >= 8


def build_model_modules(folder: Path) -> dict[str, Any]:
    return dict(load(folder).model.named_modules())


def test_a_server_model_is_scaled_when_it_computes_and_stays_as_it_is_on_disk(tmp_path: Path) -> None:
    model = small_model(tmp_path / "model")
    mask(str(model), tmp_path / "server", key=tmp_path / "key", p1=0.25)
    mask(str(model), tmp_path / "unscaled", key=tmp_path / "key", rescale=False)
    proxy = make_proxy(tmp_path / "server", tmp_path / "proxy", p1=0.25, p2=0.0, key=tmp_path / "key")
    scaled, shown = dense_tensors(tmp_path / "server"), dense_tensors(proxy)
    on_disk = load_file(tmp_path / "server" / "model.safetensors")
    assert all(torch.equal(scaled[name], shown[name]) for name in scaled)
    assert all(torch.equal(on_disk[name], tensor) for name, tensor in dense_tensors(tmp_path / "unscaled").items())
    name = "bert.encoder.layer.0.output.dense.weight"
    torch.testing.assert_close(scaled[name], on_disk[name] * 64 / 48)


def test_a_quantized_server_model_is_unpacked_and_scaled(tmp_path: Path) -> None:
    mask(str(small_model(tmp_path / "model", "gpt2")), tmp_path / "server", key=tmp_path / "key", p1=0.25)
    quantize(str(tmp_path / "server"), tmp_path / "packed", format="nf4")
    exact, coarse = dense_tensors(tmp_path / "server"), dense_tensors(tmp_path / "packed")
    assert set(exact) == set(coarse)
    for name, tensor in exact.items():
        assert coarse[name].shape == tensor.shape
        assert torch.all(coarse[name][tensor == 0] == 0)
        if tensor.ndim == 2:
            assert torch.nn.functional.cosine_similarity(coarse[name].flatten(), tensor.flatten(), dim=0) > 0.98


def test_a_manifest_that_hides_everything_is_refused(tmp_path: Path) -> None:
    mask(str(small_model(tmp_path / "model")), tmp_path / "server", key=tmp_path / "key", p1=0.25)
    path = tmp_path / "server" / "fedqsn.json"
    document = json.loads(path.read_text())
    document["groups"]["classifier.weight"]["hidden"] = 64
    path.write_text(json.dumps(document))
    with pytest.raises(FormatError, match="no unit of tensor 'classifier.weight' is visible"):
        dense_tensors(tmp_path / "server")


def test_a_missing_head_is_refused_and_never_random(tmp_path: Path) -> None:
    folder = build("bert", tmp_path / "model")
    edit_tensors(folder, lambda tensors: {n: t for n, t in tensors.items() if not n.startswith("classifier")})
    with pytest.raises(InputError, match="lacks classifier.bias and 1 more"):
        load(folder)


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    for name, head in (("bert", "BertForMaskedLM"), ("gemma", None), ("t5", None)):
        model = load(build(name, tmp_path / name, head=head)).model
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_tensor_that_the_architecture_has_not_is_refused_unless_it_holds_no_weights(tmp_path: Path) -> None:
    folder = build("bert", tmp_path / "model")
    positions = {"bert.embeddings.position_ids": torch.arange(64)}
    edit_tensors(folder, lambda tensors: tensors | positions)
    load(folder)
    edit_tensors(folder, lambda tensors: tensors | {"bert.encoder.layer.2.output.dense.weight": torch.ones(64, 128)})
    with pytest.raises(InputError, match="the architecture has no bert.encoder.layer.2"):
        load(folder)


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = build("bert", tmp_path / "model")
    edit_config(folder, num_labels=None, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    with pytest.raises(InputError, match="has another shape for classifier.bias and 1 more"):
        load(folder)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"architectures": None}, "does not name one architecture"),
        ({"architectures": ["BertModel"]}, "BertModel has no head"),
        ({"architectures": ["BertForSequenceClassification", "BertForMaskedLM"]}, "does not name one architecture"),
        ({"architectures": ["OsForCausalLM"]}, "transformers has no architecture OsForCausalLM"),
        ({"architectures": ["AutoModelForCausalLM"]}, "transformers has no architecture AutoModelForCausalLM"),
        ({"architectures": ["RobertaForSequenceClassification"]}, "lacks classifier.dense.bias and"),
        ({"hidden_size": "wide"}, "transformers cannot build the model"),
        ({"hidden_size": 63}, "transformers cannot build the model"),
    ],
)
def test_configs_that_lead_nowhere_are_refused(tmp_path: Path, fields: dict[str, Any], complaint: str) -> None:
    folder = build("bert", tmp_path / "model")
    edit_config(folder, **fields)
    with pytest.raises(InputError, match=complaint):
        load(folder)


def test_a_file_without_a_config_is_refused(tmp_path: Path) -> None:
    folder = build("bert", tmp_path / "model")
    with pytest.raises(InputError, match="there is no config.json"):
        load(folder / "model.safetensors")
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="there is no config.json"):
        load(folder)


def test_code_that_comes_with_a_model_is_never_run_and_kernels_are_never_fetched(tmp_path: Path) -> None:
    folder = build("bert", tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    shutil.copy(folder / "evil.py", folder / "modeling_evil.py")
    references = {"AutoConfig": "evil.Evil", "AutoModelForSequenceClassification": "modeling_evil.Evil"}
    edit_config(folder, auto_map=references, attn_implementation="somebody/evil-kernels", use_kernels=True)
    loaded = load(folder)
    assert type(loaded.model).__module__.startswith("transformers.models.bert")
    assert not (tmp_path / "ran").exists()


def test_no_code_of_a_tokenizer_is_run(tmp_path: Path) -> None:
    folder = small_model(tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    path = folder / "tokenizer_config.json"
    document = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | document))
    assert load(folder).tokenizer is not None  # transformers has a class of its own for such files
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_that_was_good_is_tried_again_when_a_file_has_changed(tmp_path: Path) -> None:
    folder = small_model(tmp_path / "model")
    path = folder / "tokenizer.json"
    before, text = path.stat(), path.read_text()
    assert load(folder).tokenizer is not None
    document = json.loads(text)
    document["model"]["vocab"] = {"[UNK]": 0}
    path.write_text(json.dumps(document).ljust(len(text)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(InputError, match="knows no word but special tokens"):
        load(folder)


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = small_model(tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="the tokenizer cannot be loaded"):
        load(folder)


def test_weights_may_be_given_and_are_then_not_read_again(tmp_path: Path) -> None:
    folder = build("bert", tmp_path / "model")
    with Checkpoint.open(folder) as checkpoint:
        dense = load_dense(checkpoint)
        dense["classifier.bias"] = torch.full((5,), 3.0)
        loaded = load_model(checkpoint, dense=dense)
    assert loaded.model.classifier.bias.tolist() == [3.0] * 5


def test_devices_are_checked() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")
    for name in ("tpu", "cpu:1", "cuda:x", "cuda:-1", "", "cuda:99"):
        with pytest.raises(InputError, match="--device"):
            choose_device(name)


@pytest.mark.parametrize("family", ["qwen2", "llama", "bert"])
@pytest.mark.parametrize("named", [None, "Qwen2Tokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_a_tokenizer_is_the_one_that_its_file_describes(named: str | None, family: str, tmp_path: Path) -> None:
    build(family, tmp_path, tokenizer=True)  # of words: transformers makes a BPE of it for some classes
    if named is not None:
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": named}))
    with Checkpoint.open(tmp_path) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
    assert tokenizer("w3 w4")["input_ids"] == [3, 4]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (0, 2, 64)


def test_a_config_may_have_no_padding_id() -> None:
    config = transformers.CodeGenConfig(
        n_embd=8, n_layer=1, n_head=1, vocab_size=9, rotary_dim=8, bos_token_id=1, eos_token_id=2
    )
    assert not hasattr(config, "pad_token_id")
    with torch.device("meta"):
        model = transformers.CodeGenForCausalLM(config)
    assert Loaded(model, None, "causal-lm").pad_id == 0
