"""Small worlds for the tests of the owner's commands: checkpoints made with numpy alone, updates, ways to look in.

model = make_model(folder, "bert", dtype="BF16", hidden=33)     a checkpoint of a few kilobytes, in milliseconds
send(proxy, folder, lambda name, shape: ...)                    an update as a client would send it
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.artifacts.manifests import Losses, UpdateManifest, file_digest, manifest_bytes
from fedqsn_cli.checkpoint import Checkpoint
from fedqsn_cli.masks import job_key
from fedqsn_cli.models.model import model_tensors, open_model
from support.raw_safetensors import Tensors as Tensors
from support.raw_safetensors import read_file as read_file
from support.raw_safetensors import read_model as read_model
from support.raw_safetensors import to_bits as to_bits
from support.raw_safetensors import to_floats as to_floats
from support.raw_safetensors import write_file as write_file
from support.raw_safetensors import write_model as write_model

Array = NDArray[Any]

CONFIG_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


# ------------------------------------------------------------------------------------------------ models

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


# ------------------------------------------------------------------------------------------------ looking


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def listing(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Everything below a folder, hidden things too: type and mode, size, digest. For "nothing was written"."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        digest = file_digest(path) if path.is_file() else ""
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_size if digest else 0, digest)
    return found


@contextmanager
def nothing_written(folder: Path) -> Iterator[None]:
    """Fails when anything below the folder is another one afterwards."""
    before = listing(folder)
    yield
    assert listing(folder) == before


def drawn(key: bytes, scope: Sequence[str], group: str, allowed: Array, ratio: float) -> NDArray[np.bool_]:
    """The units that a key draws, exactly as DESIGN puts it."""
    fields = [field.encode() for field in ("fedqsn/v1", *scope, group)]
    seed = hmac.digest(key, b"".join(len(field).to_bytes(8, "big") + field for field in fields), "sha256")
    ranks = np.frombuffer(hashlib.shake_256(seed).digest(8 * allowed.size), "<u8")
    candidates = sorted(np.flatnonzero(allowed), key=lambda unit: (ranks[unit], unit))
    hidden = np.zeros(allowed.size, np.bool_)
    hidden[candidates[: max(0, min(round(ratio * len(candidates)), len(candidates) - 1))]] = True
    return hidden


def hidden_elements(model: Path, key: Path) -> dict[str, NDArray[np.bool_]]:
    """For each tensor of a global model the elements that the key's server mask hides.

    The draw is written out here once more; only the plan (roles, groups, axes) is the product's own.
    """
    job = job_key.load(key)
    found = {}
    for tensor in open_model(str(model), axis=job.axis, overrides=job.overrides).plan.tensors:
        flags = np.zeros(tensor.view, np.bool_)
        ratio = job.p1 if tensor.p1 is None else tensor.p1
        for part in range(tensor.view[0] if tensor.masked else 0):
            units = drawn(job.key, ("server",), tensor.groups[part], np.ones(tensor.units, np.bool_), ratio)
            if tensor.axis == "row":
                flags[part, units, :] = True
            elif tensor.axis == "column":
                flags[part][:, units] = True
            else:
                flags[part] = units.reshape(tensor.view[1:])
        found[tensor.name] = flags.reshape(tensor.shape)
    return found


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


# ------------------------------------------------------------------------------------------------ updates

Values = Callable[[str, tuple[int, ...]], Array]


@dataclass
class Update:
    """An update on its way: what its files will hold. Change it, then `write` it."""

    tensors: Tensors
    manifest: dict[str, Any]

    def write(self, folder: Path, *, honest: bool = True) -> Path:
        """Write it; `honest` puts the file's real digest into update.json."""
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "update.safetensors", self.tensors, {"format": "pt"})
        if honest:
            self.manifest["files"] = {"update.safetensors": file_digest(folder / "update.safetensors")}
        (folder / "update.json").write_text(json.dumps(self.manifest))
        return folder


def draft(proxy: Path, values: Values, *, examples: int = 10, precision: str = "fp32") -> Update:
    """An update for a proxy: U on its visible units, `values(name, full shape)[visible]`, in the proxy's own names.

    Shapes follow DESIGN: units that are not seen drop out of their dimension; single weights lie flat.
    """
    dtype = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}[precision]
    manifest = json.loads((proxy / "proxy.json").read_bytes())
    shown = visible_elements(proxy)
    tensors: Tensors = {}
    with Checkpoint.open(proxy) as checkpoint:
        logical = model_tensors(checkpoint)
    for name, tensor in logical.items():
        if not tensor.is_float:
            continue
        whole = np.asarray(values(name, tensor.shape), np.float32)
        if name in shown and manifest.get("train") is None:
            whole = _seen(whole, shown[name], manifest["tensors"][name]["axis"])
        tensors[name] = (dtype, to_bits(whole, dtype))
    facts = UpdateManifest(
        proxy_id=manifest["proxy_id"],
        proxy_sha256=file_digest(proxy / "proxy.json"),
        num_examples=examples,
        steps=3,
        losses=Losses(first=1.5, last=1.25, eval_before=None, eval_after=None),
        precision=precision,
        tool="test",
        files={},
    )
    return Update(tensors, json.loads(manifest_bytes(facts)))


def _seen(whole: Array, shown: NDArray[np.bool_], axis: str) -> Array:
    """The seen part of a tensor; `shown` has the shape of its view (lead, rows, cols)."""
    if axis == "element":
        return whole.reshape(-1)[shown.reshape(-1)]
    parts = zip(whole.reshape(shown.shape), shown, strict=True)
    kept = np.stack([part[f.any(axis=1)] if axis == "row" else part[:, f.any(axis=0)] for part, f in parts])
    if whole.ndim == 3:
        return kept
    if shown.shape[2] == 1:  # a bias, or one bias a slice
        return kept.reshape(-1) if whole.ndim == 1 else kept[..., 0]
    return kept[0]


def send(proxy: Path, folder: Path, values: Values | None = None, **options: Any) -> Path:
    """Write an update for a proxy; without values one of zeros."""
    return draft(proxy, values or (lambda name, shape: np.zeros(shape)), **options).write(folder)


def noise(seed: int, size: float = 0.01) -> Values:
    """Normal numbers that depend on the tensor's name."""

    def values(name: str, shape: tuple[int, ...]) -> Array:
        digest = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
        return np.random.default_rng(digest).standard_normal(shape).astype(np.float32) * np.float32(size)

    return values


# ------------------------------------------------------------------------------------------------ processes


def environment(**more: str) -> dict[str, str]:
    """The environment of a child process that finds the same sources."""
    import fedqsn_cli

    path = with_sources(Path(fedqsn_cli.__file__).parents[1])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more


def with_sources(*folders: Path) -> str:
    """PYTHONPATH with these folders in front; packages may come from what it is."""
    return os.pathsep.join(filter(None, [*map(str, folders), os.environ.get("PYTHONPATH")]))


HOST, USER = "Zq7-this-machine", "Zq7-this-user"


def here(patch: Any) -> None:
    """Give machine and user names that stand nowhere by chance; a real one may be a word of every model, or missing."""
    patch.setattr("socket.gethostname", lambda: HOST)
    patch.setattr("platform.node", lambda: HOST)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOSTNAME"):
        patch.setenv(name, HOST if name == "HOSTNAME" else USER)


def programs(folder: Path) -> str:
    """A PATH on which `fedqsn` and `python` are those under test, with PYTHONPATH as `environment` has it.

    The programs beside the interpreter where there are: a temporary folder may be one in which nothing can be executed.
    """
    path = os.environ.get("PATH", os.defpath)
    beside = Path(sys.executable).parent
    if all(os.access(beside / name, os.X_OK) for name in ("fedqsn", "python")):
        return f"{beside}{os.pathsep}{path}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, command in {"fedqsn": "-m fedqsn_cli", "python": ""}.items():
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {command} "$@"\n')
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{path}"


def words(arguments: Sequence[str | Path]) -> list[str]:
    """Arguments of a command as text."""
    return [str(argument) for argument in arguments]
