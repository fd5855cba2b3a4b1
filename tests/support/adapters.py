"""Updates of adapters, made by hand: factors of any rank and orientation, zero in hidden units."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.artifacts.manifests import (
    AdapterRecord,
    file_digest,
)
from fedqsn_cli.checkpoint import Checkpoint
from fedqsn_cli.models.model import model_tensors
from support.helpers import Tensors, claims, seen, to_bits, to_floats, visible_elements
from support.raw_safetensors import write_file

Doubles = NDArray[np.float64]

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": None,
    "lora_dropout": 0.0,
    "bias": "none",
    "use_dora": False,
    "rank_pattern": {},
    "base_model_name_or_path": None,
    "inference_mode": True,
    "use_rslora": False,
    "modules_to_save": None,
}


@dataclass
class AdapterUpdate:
    """An update on its way: what its files will hold. Change it, then `write` it.

    Args:
        factors: of adapter_model.safetensors. saved: of update.safetensors.
    """

    factors: Tensors
    manifest: dict[str, Any]
    config: dict[str, Any]
    saved: Tensors = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Write it, with the real digests in update.json."""
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "adapter_model.safetensors", self.factors, {"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(self.config))
        if self.saved:
            write_file(folder / "update.safetensors", self.saved, {"format": "pt"})
        self.manifest["files"] = {path.name: file_digest(path) for path in folder.iterdir()}
        (folder / "update.json").write_text(json.dumps(self.manifest))
        return folder

    def product(self, name: str) -> Doubles:
        """U of a tensor in double precision, from its factors."""
        record = self.manifest["adapters"][name]
        a, b = (to_floats(bits, dtype).astype(np.float64) for dtype, bits in self._pair(record["module"]))
        whole = record["scaling"] * (b @ a)
        return whole.T if record["transposed"] else whole

    def _pair(self, module: str) -> tuple[Any, Any]:
        return self.factors[f"{module}.lora_A.weight"], self.factors[f"{module}.lora_B.weight"]


def draft_adapters(
    proxy: Path,
    seed: int,
    *,
    rank: int = 3,
    alpha: float = 6.0,
    examples: int = 10,
    precision: str = "fp32",
    size: float = 0.1,
    keep: Mapping[str, bool] | None = None,
    saved: tuple[str, ...] = (),
) -> AdapterUpdate:
    """Adapters of random factors for the matrices of a proxy.

    Args:
        keep: which tensors get one; all matrices by default. saved: tensors to train in full.
    """
    dtype = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}[precision]
    told, shown = json.loads((proxy / "proxy.json").read_bytes()), visible_elements(proxy)
    with Checkpoint.open(proxy) as checkpoint:
        shapes = {name: tensor.shape for name, tensor in model_tensors(checkpoint).items() if tensor.is_float}
    update = AdapterUpdate({}, {}, CONFIG | {"r": rank, "lora_alpha": alpha})
    records: dict[str, AdapterRecord] = {}
    rng = np.random.default_rng(seed)
    for name in sorted(shapes):
        shape = shapes[name]
        if name in saved:
            whole = rng.standard_normal(shape) * size
            if name in shown:
                update.factors[_saved(name)] = (dtype, to_bits(whole.astype(np.float32), dtype))
                whole = seen(whole, shown[name], told["tensors"][name]["axis"])
            else:
                update.factors[_saved(name)] = (dtype, to_bits(whole.astype(np.float32), dtype))
            update.saved[name] = (dtype, to_bits(whole.astype(np.float32), dtype))
        elif len(shape) == 2 and "bias" not in name and (keep is None or keep.get(name, False)) and rank <= min(shape):
            transposed = bool(zlib.crc32(name.encode()) % 2)
            left, right = rng.standard_normal((shape[0], rank)) * size, rng.standard_normal((rank, shape[1])) * size
            if name in shown and told.get("train") is None:
                flags = shown[name].reshape(shape)
                left, right = left * flags.any(axis=1)[:, None], right * flags.any(axis=0)
            module = f"base_model.model.{name.removesuffix('.weight')}"
            b, a = (right.T, left.T) if transposed else (left, right)
            update.factors[f"{module}.lora_A.weight"] = (dtype, to_bits(a.astype(np.float32), dtype))
            update.factors[f"{module}.lora_B.weight"] = (dtype, to_bits(b.astype(np.float32), dtype))
            records[name] = AdapterRecord(module=module, rank=rank, scaling=alpha / rank, transposed=transposed)
    update.config["target_modules"] = [record.module.removeprefix("base_model.model.") for record in records.values()]
    update.config["modules_to_save"] = sorted({name.rpartition(".")[0] for name in saved}) or None
    update.manifest = claims(
        proxy,
        told["proxy_id"],
        num_examples=examples,
        precision=precision,
        adapters=records,
        saved={name: _saved(name) for name in update.saved} or None,
    )
    return update


def _saved(name: str) -> str:
    return f"base_model.model.{name}"
