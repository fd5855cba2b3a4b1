"""Checkpoints of a few kilobytes in the names and shapes of many families, and numbers for updates.

Made with numpy alone, by docs/formats.md, and apart from the product: the golden corpus was recorded from these very
bytes, also with sources of other versions.

make_model(folder, "bert", dtype="BF16", hidden=33)     in milliseconds
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from support.raw_safetensors import Tensors, read_file, to_bits, write_model

Array = NDArray[Any]
Values = Callable[[str, tuple[int, ...]], Array]

CONFIG_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


Shapes = dict[str, tuple[int, ...]]


def _bert(h: int, n: int, v: int) -> Shapes:
    at = "bert.encoder.layer.0."
    return {
        "bert.embeddings.word_embeddings.weight": (v, h),
        "bert.embeddings.position_embeddings.weight": (7, h),
        "bert.embeddings.LayerNorm.weight": (h,),
        "bert.embeddings.LayerNorm.bias": (h,),
        at + "attention.self.query.weight": (h, h),
        at + "attention.self.query.bias": (h,),
        at + "intermediate.dense.weight": (n, h),
        at + "intermediate.dense.bias": (n,),
        at + "output.dense.weight": (h, n),
        at + "output.dense.bias": (h,),
        "bert.pooler.dense.weight": (h, h),
        "bert.pooler.dense.bias": (h,),
        "classifier.weight": (5, h),
        "classifier.bias": (5,),
    }


def _gpt2(h: int, n: int, v: int) -> Shapes:
    at = "transformer.h.0."
    return {
        "transformer.wte.weight": (v, h),
        "transformer.wpe.weight": (7, h),
        at + "ln_1.weight": (h,),
        at + "attn.c_attn.weight": (h, 3 * h),
        at + "attn.c_attn.bias": (3 * h,),
        at + "mlp.c_fc.weight": (h, n),
        at + "mlp.c_fc.bias": (n,),
        at + "mlp.c_proj.weight": (n, h),
        at + "mlp.c_proj.bias": (h,),
    }


def _llama(h: int, n: int, v: int) -> Shapes:
    at = "model.layers.0."
    return {
        "model.embed_tokens.weight": (v, h),
        at + "input_layernorm.weight": (h,),
        at + "self_attn.q_proj.weight": (h, h),
        at + "self_attn.o_proj.weight": (h, h),
        at + "mlp.gate_proj.weight": (n, h),
        at + "mlp.up_proj.weight": (n, h),
        at + "mlp.down_proj.weight": (h, n),
        "model.norm.weight": (h,),
        "lm_head.weight": (v, h),
    }


def _llama_tied(h: int, n: int, v: int) -> Shapes:
    """Tied, and the copy is in the file too."""
    return _llama(h, n, v)


def _qwen2(h: int, n: int, v: int) -> Shapes:
    shapes = _llama(h, n, v) | {"model.layers.0.self_attn.q_proj.bias": (h,)}
    del shapes["lm_head.weight"]
    return shapes


def _t5(h: int, n: int, v: int) -> Shapes:
    at = "encoder.block.0.layer."
    return {
        "shared.weight": (v, h),
        at + "0.SelfAttention.q.weight": (h, h),
        at + "0.SelfAttention.o.weight": (h, h),
        at + "0.SelfAttention.relative_attention_bias.weight": (9, 4),
        at + "0.layer_norm.weight": (h,),
        at + "1.DenseReluDense.wi_0.weight": (n, h),
        at + "1.DenseReluDense.wo.weight": (h, n),
    }


def _mixtral(h: int, n: int, v: int) -> Shapes:
    at = "model.layers.0.block_sparse_moe."
    experts = {f"{at}experts.{i}.{w}.weight": s for i in range(2) for w, s in (("w1", (n, h)), ("w2", (h, n)))}
    return {"model.embed_tokens.weight": (v, h), "model.norm.weight": (h,), at + "gate.weight": (2, h)} | experts


def _gpt_oss(h: int, n: int, v: int) -> Shapes:
    at = "model.layers.0."
    return {
        "model.embed_tokens.weight": (v, h),
        at + "self_attn.sinks": (4,),
        at + "self_attn.q_proj.weight": (h, h),
        at + "self_attn.q_proj.bias": (h,),
        at + "mlp.router.weight": (3, h),
        at + "mlp.router.bias": (3,),
        at + "mlp.experts.gate_up_proj": (3, h, 2 * n),
        at + "mlp.experts.gate_up_proj_bias": (3, 2 * n),
        at + "mlp.experts.down_proj": (3, n, h),
        at + "mlp.experts.down_proj_bias": (3, h),
    }


SHAPES: dict[str, tuple[Callable[[int, int, int], Shapes], dict[str, Any]]] = {
    "bert": (_bert, {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}),
    "gpt2": (_gpt2, {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}),
    "llama": (_llama, {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}),
    "llama-tied": (
        _llama_tied,
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    ),
    "qwen2": (_qwen2, {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}),
    "t5": (_t5, {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}),
    "mixtral": (_mixtral, {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}),
    "gpt_oss": (_gpt_oss, {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]}),
}


def make_tensors(
    name: str, *, dtype: str = "F32", hidden: int = 32, inner: int = 48, vocabulary: int = 41, seed: int = 0
) -> Tensors:
    """Random tensors in the names and shapes of a family; with zeros, negative zeros, tiny and large numbers."""
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    for tensor, shape in SHAPES[name][0](hidden, inner, vocabulary).items():
        values = rng.standard_normal(shape).astype(np.float32) * np.float32(0.05)
        flat = values.reshape(-1)
        flat[::11] = [-0.0, 0.0, 1e-30, 0.7][rng.integers(4)]
        values[rng.integers(len(values))] = 0
        tensors[tensor] = (dtype, to_bits(values, dtype))
    if name == "llama-tied":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    if name == "bert":
        tensors["bert.embeddings.position_ids"] = ("I64", np.arange(7, dtype=np.int64)[None])
    return tensors


def make_config(name: str, dtype: str = "F32") -> dict[str, Any]:
    """What config.json says about a family, as far as fedqsn looks."""
    return SHAPES[name][1] | {"dtype": CONFIG_DTYPES[dtype], "vocab_size": 41}


def make_model(folder: Path, name: str = "bert", *, dtype: str = "F32", shards: int = 1, **options: Any) -> Path:
    """A checkpoint directory of a family; options go to `make_tensors`."""
    return write_model(folder, make_tensors(name, dtype=dtype, **options), make_config(name, dtype), shards=shards)


def visible_elements(proxy: Path) -> dict[str, NDArray[np.bool_]]:
    """For each tensor of a proxy the elements that it shows, from visible.safetensors and proxy.json alone."""
    manifest = json.loads((proxy / "proxy.json").read_bytes())
    packed = read_file(proxy / "visible.safetensors")
    found = {}
    for name, units in manifest["tensors"].items():
        lead, rows, cols = units["view"]
        flags = np.zeros((lead, rows, cols), np.bool_)
        for part, group in enumerate(units["groups"]):
            shown = np.unpackbits(packed[group][1])[: manifest["groups"][group]["units"]].astype(np.bool_)
            if units["axis"] == "row":
                flags[part] = shown[:, None]
            elif units["axis"] == "column":
                flags[part] = shown[None, :]
            else:
                flags[part] = shown.reshape(rows, cols)
        found[name] = flags
    return found


def seen(whole: Array, shown: NDArray[np.bool_], axis: str) -> Array:
    """The seen part of a tensor; `shown` has the shape of its view (lead, rows, cols)."""
    if axis == "element":
        return whole.reshape(-1)[shown.reshape(-1)]
    parts = zip(whole.reshape(shown.shape), shown, strict=True)
    kept = np.stack([part[f.any(axis=1)] if axis == "row" else part[:, f.any(axis=0)] for part, f in parts])
    if whole.ndim == 3:
        return kept
    if shown.shape[2] == 1:  # a bias, or one bias a slice
        return kept.reshape(-1) if whole.ndim == 1 else kept[..., 0]
    return np.asarray(kept[0])


def noise(seed: int, size: float = 0.01) -> Values:
    """Normal numbers that depend on the tensor's name."""

    def values(name: str, shape: tuple[int, ...]) -> Array:
        digest = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
        return np.random.default_rng(digest).standard_normal(shape).astype(np.float32) * np.float32(size)

    return values
