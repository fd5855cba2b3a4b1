"""I9: codes, scales and names are those of bitsandbytes and transformers; plain from_pretrained opens every proxy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedqsn_cli import export_proxy
from invariants.test_i2_one_code import is_turned
from support.families import build
from support.hardware import assert_close, fused_dynamic_map, unpack, unpacked_weights
from support.helpers import read_model, visible_elements
from support.keys import known_key

CLASSIFIERS = ("bert", "roberta", "gpt2", "llama", "qwen2", "mistral", "gemma", "phi", "t5", "mixtral")
LANGUAGE_MODELS = ("gpt2", "llama", "qwen2", "mistral", "gemma", "phi", "mixtral")
HEADS = {
    "bert": "Bert",
    "roberta": "Roberta",
    "gpt2": "GPT2",
    "llama": "Llama",
    "qwen2": "Qwen2",
    "mistral": "Mistral",
    "gemma": "Gemma",
    "phi": "Phi",
    "t5": "T5",
    "mixtral": "Mixtral",
}


def proxy_of(model: Path, out: Path, **options: Any) -> Path:
    usual = {
        "client": "ann",
        "round": 1,
        "p1": 0.0,
        "p2": 0.0,
        "key": model.parent / f"{model.name}.key",
        "ledger": out.with_name(f"{out.name}.jsonl"),  # all jobs here have one key
    }
    with known_key():  # what a processor makes of a layer depends on which units are left
        export_proxy(str(model), out, **usual | options)
    return out


@pytest.fixture(autouse=True, scope="module")
def fused_map() -> Iterator[None]:
    with fused_dynamic_map():
        yield


@pytest.fixture(scope="module")
def models(module_folder: Path) -> dict[tuple[str, str], Path]:
    """Checkpoints of all families, each with a classifier and, where there is one, a language model head."""
    built = {}
    for task, names in (("SequenceClassification", CLASSIFIERS), ("CausalLM", LANGUAGE_MODELS)):
        for name in names:
            head = f"{HEADS[name]}For{task}" if (name, task) != ("gpt2", "CausalLM") else "GPT2LMHeadModel"
            built[name, task] = build(name, module_folder / f"{name}-{task}", head=head, num_hidden_layers=1)
    return built


# ---------------------------------------------------------------- what transformers writes


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "mixtral"])
@pytest.mark.parametrize(("format", "double"), [("nf4", False), ("nf4", True), ("fp4", False), ("int8", False)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_i9_a_proxy_of_everything_is_what_transformers_saves_for_the_same_weights(
    family: str, format: str, double: bool, dtype: str, folder: Path
) -> None:
    import transformers

    model = build(family, folder / "model", dtype=dtype, num_hidden_layers=1)
    proxy = proxy_of(model, folder / "proxy", format=format, double_quant=double)
    config = json.loads((proxy / "config.json").read_text())
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=format != "int8",
        load_in_8bit=format == "int8",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_quant_type="fp4" if format == "int8" else format,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=config["quantization_config"]["llm_int8_skip_modules"],
    )
    architecture = getattr(transformers, config["architectures"][0])
    architecture.from_pretrained(model, quantization_config=quantization, dtype=dtype).save_pretrained(folder / "saved")
    ours, theirs = read_model(proxy), read_model(folder / "saved")
    assert ours.keys() == theirs.keys()
    packed = 0
    for name, (kind, bits) in theirs.items():
        assert ours[name][0] == kind
        if name.endswith(("bitsandbytes__nf4", "bitsandbytes__fp4")):  # ours may end in spaces
            assert json.loads(ours[name][1].tobytes()) == json.loads(bits.tobytes())
            continue
        assert ours[name][1].shape == bits.shape
        if kind in {"U8", "I8"} or name.endswith(("absmax", "quant_map", "SCB", "bias", "norm.weight")):
            packed += kind in {"U8", "I8"}
            assert ours[name][1].tobytes() == bits.tobytes(), name
    assert packed >= 4
    saved = json.loads((folder / "saved/config.json").read_text())["quantization_config"]
    assert saved | {"bnb_4bit_compute_dtype": 0} == config["quantization_config"] | {"bnb_4bit_compute_dtype": 0}


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("block", [64, 256])
def test_i9_codes_and_scales_are_those_of_quantize_4bit(format: str, dtype: str, block: int, folder: Path) -> None:
    import torch
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import load_file

    model = build("gpt2", folder / "model", dtype=dtype, n_embd=72, num_hidden_layers=1)
    proxy = proxy_of(model, folder / "proxy", format=format, block_size=block)
    dense, packed = load_file(model / "model.safetensors"), load_file(proxy / "model.safetensors")
    weights = [name for name in dense if f"{name}.absmax" in packed]
    assert len(weights) == 4
    for name in weights:
        codes, state = quantize_4bit(dense[name].T.contiguous(), blocksize=block, quant_type=format)
        assert torch.equal(packed[name].reshape(-1), codes.reshape(-1))
        assert torch.equal(packed[f"{name}.absmax"], state.absmax)
        assert torch.equal(packed[f"{name}.quant_map"], state.code)


# ---------------------------------------------------------------- what transformers reads


def logits(model: Any) -> Any:
    """Logits of one fixed text."""
    import torch

    ids = torch.tensor([[1, 5, 17, 40, 96, 2], [1, 9, 9, 30, 4, 2]])
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def open_plainly(proxy: Path, task: str) -> Any:
    """As any user would open it."""
    import transformers

    kind = getattr(transformers, f"AutoModelFor{task}")
    model, report = kind.from_pretrained(proxy, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


def open_ours(proxy: Path) -> Any:
    from fedqsn_cli.checkpoint import Checkpoint
    from fedqsn_cli.models.torch_model import load_model

    with Checkpoint.open(proxy) as checkpoint:
        return load_model(checkpoint).model.eval()


def check_packed_weights(proxy: Path, plain: Any) -> int:
    """What bitsandbytes unpacks is what our loader unpacks, number for number; returns how many layers are packed."""
    import torch

    from fedqsn_cli.checkpoint import Checkpoint
    from fedqsn_cli.models.torch_model import load_dense

    with Checkpoint.open(proxy) as checkpoint:
        dense = load_dense(checkpoint)
    theirs = {f"{name}.weight": weight for name, weight in unpacked_weights(plain)}
    for name, weight in theirs.items():
        assert torch.equal(dense[name].T if is_turned(name) else dense[name], weight), name
    return len(theirs)


CASES = [(name, "SequenceClassification") for name in CLASSIFIERS] + [(name, "CausalLM") for name in LANGUAGE_MODELS]


@pytest.mark.parametrize(("family", "task"), CASES)
@pytest.mark.parametrize(("format", "layout"), [("nf4", "bnb"), ("nf4", "dense")])
def test_i9_from_pretrained_opens_a_proxy_and_computes_what_our_loader_computes(
    family: str, task: str, format: str, layout: str, models: dict[tuple[str, str], Path], folder: Path
) -> None:
    import torch

    model = models[family, task]
    proxy = proxy_of(model, folder / "proxy", key=folder / "key", p1=0.2, p2=0.2, format=format, layout=layout)
    plain = open_plainly(proxy, task)
    packed = check_packed_weights(proxy, plain)
    assert (packed > 0) == (layout == "bnb")
    ours = logits(open_ours(proxy))
    torch.testing.assert_close(logits(unpack(open_plainly(proxy, task))), ours, rtol=1e-4, atol=1e-5)
    assert_close(logits(plain), ours, layers=packed)
    assert not torch.allclose(ours, logits(open_ours(model)), atol=1e-3)


@pytest.mark.parametrize(("format", "double"), [("fp4", False), ("int8", False), ("nf4", True)])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_i9_from_pretrained_opens_the_other_packed_formats(
    family: str, format: str, double: bool, models: dict[tuple[str, str], Path], folder: Path
) -> None:
    import torch

    model = models[family, "SequenceClassification"]
    proxy = proxy_of(model, folder / "p", key=folder / "key", p1=0.2, p2=0.2, format=format, double_quant=double)
    plain = open_plainly(proxy, "SequenceClassification")
    packed = check_packed_weights(proxy, plain)
    assert packed
    ours = logits(open_ours(proxy))
    unpacked = unpack(open_plainly(proxy, "SequenceClassification"))
    torch.testing.assert_close(logits(unpacked), ours, rtol=1e-4, atol=1e-5)
    if format == "int8":  # bitsandbytes multiplies int8 with int8: it rounds what goes into a layer, too
        torch.testing.assert_close(logits(plain), ours, rtol=0.05, atol=0.05)
    else:
        assert_close(logits(plain), ours, layers=packed)


@pytest.mark.parametrize(("format", "layout"), [("nf4", "bnb"), ("int8", "bnb"), ("nf3", "dense"), ("none", None)])
def test_i9_what_a_client_does_not_see_is_zero_in_the_opened_model(
    format: str, layout: str | None, folder: Path
) -> None:
    import torch

    model = build("bert", folder / "model", num_hidden_layers=1)
    proxy = proxy_of(model, folder / "proxy", p1=0.3, p2=0.3, format=format, layout=layout)
    opened = open_plainly(proxy, "SequenceClassification")
    name = "bert.encoder.layer.0.intermediate.dense"
    hidden = torch.from_numpy(~visible_elements(proxy)[f"{name}.weight"][0].any(axis=1))
    output = opened.get_submodule(name)(torch.randn(3, 64))
    assert not output[:, hidden].any()
    assert output[:, ~hidden].any(dim=0).all()  # a single one may be zero, where products are rounded to bf16
    assert 0.4 < hidden.float().mean() < 0.6


def test_i9_masked_rows_of_int8_codes_divide_by_nothing(folder: Path) -> None:
    model = build("bert", folder / "model", num_hidden_layers=1)
    proxy = proxy_of(model, folder / "proxy", p1=0.5, p2=0.5, format="int8")
    opened = open_plainly(proxy, "SequenceClassification")
    assert bool(np.isfinite(logits(opened).numpy()).all())
