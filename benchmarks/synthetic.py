"""A Llama-shaped checkpoint of random bf16 weights: `python -m benchmarks.synthetic SIZE FOLDER [SEED]`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARD_BYTES = 5_000_000_000
CHUNK = 1 << 22  # weights that are drawn at a time


@dataclass(frozen=True)
class Shape:
    """The shape of a Llama model."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    inner: int
    vocabulary: int = 32000

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order of names."""
        narrow = self.hidden // self.heads * self.key_heads
        matrices = {
            "mlp.down_proj": (self.hidden, self.inner),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "self_attn.k_proj": (narrow, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.v_proj": (narrow, self.hidden),
        }
        names = {"lm_head.weight": (self.vocabulary, self.hidden), "model.norm.weight": (self.hidden,)}
        names["model.embed_tokens.weight"] = (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            for name, shape in matrices.items():
                names[f"model.layers.{layer}.{name}.weight"] = shape
            for norm in ("input_layernorm", "post_attention_layernorm"):
                names[f"model.layers.{layer}.{norm}.weight"] = (self.hidden,)
        yield from sorted(names.items())

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for _, shape in self.tensors())

    def config(self) -> dict[str, Any]:
        """config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": "bfloat16",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "intermediate_size": self.inner,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


SHAPES = {
    "tiny": Shape(64, 2, 4, 4, 128, 512),
    "0.005b": Shape(256, 4, 4, 4, 704, 4000),
    "0.01b": Shape(256, 4, 4, 4, 704, 8000),
    "0.1b": Shape(768, 8, 12, 12, 2048),
    "1.1b": Shape(2048, 22, 32, 4, 5632),  # TinyLlama
    "7b": Shape(4096, 32, 32, 32, 11008),  # Llama 2
}


def write(shape: Shape, folder: Path, seed: int, shard_bytes: int = SHARD_BYTES) -> None:
    """Write config.json and the weights, in shards of so many bytes at most, or of one tensor."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, dims in shape.tensors():
        nbytes = 2 * math.prod(dims)
        if size + nbytes > shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = dims
        size += nbytes
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        weight_map |= dict.fromkeys(tensors, file)
        write_file(folder / file, tensors, "BF16", 0.02, seed + number)
    if len(shards) > 1:
        document = {"metadata": {"total_size": 2 * shape.parameters}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(document))


def write_file(path: Path, tensors: dict[str, tuple[int, ...]], dtype: str, deviation: float, seed: int) -> None:
    """One safetensors file of normally distributed numbers, F32 or BF16."""
    import numpy as np

    random, itemsize = np.random.default_rng(seed), {"F32": 4, "BF16": 2}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dims in tensors.items():
        end = position + itemsize * math.prod(dims)
        header[name] = {"dtype": dtype, "shape": list(dims), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for dims in tensors.values():
            size = math.prod(dims)
            for start in range(0, size, CHUNK):  # no weight twice: an audit finds copies
                weights = random.standard_normal(min(CHUNK, size - start), np.float32) * np.float32(deviation)
                file.write(weights.view(np.uint16)[1::2].tobytes() if dtype == "BF16" else weights)


def bulk_digest(path: Path) -> str:
    """The digest that `client-train` records of a file of tensors."""
    from fedqsn_cli.kernels.digests import new_hash, written

    digest = new_hash("blake3")
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)
    return written("blake3", digest)


if __name__ == "__main__":
    write(SHAPES[sys.argv[1]], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
