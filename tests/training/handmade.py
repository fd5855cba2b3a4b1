"""Small models, data files and proxies made by hand, step by step as DESIGN says, without the exporter."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from families import build
from fedqsn_cli.artifacts import GroupUnits, ProxyManifest, Units, file_digest, manifest_bytes
from fedqsn_cli.checkpoint import Checkpoint
from fedqsn_cli.plan import Plan, make_plan
from fedqsn_cli.quantization import kernels
from fedqsn_cli.units import UnitMask


def small_model(folder: Path, name: str = "bert", **options: Any) -> Path:
    """A tiny checkpoint with a tokenizer of words w3 ... w96; one layer, unless options say more."""
    return build(name, folder, tokenizer=True, **options)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labelled(path: Path, rows: int = 24, labels: int = 5) -> Path:
    """Texts of different lengths whose first word tells their label."""
    texts = (" ".join([f"w{10 + row % labels}"] + ["w5", "w6", "w7"] * (row % 4)) for row in range(rows))
    return write_lines(path, ({"text": text, "label": row % labels} for row, text in enumerate(texts)))


def plain_texts(path: Path, rows: int = 12) -> Path:
    """Texts for a language model, each of them a run of successive words."""
    texts = (" ".join(f"w{3 + (row + step) % 90}" for step in range(4 + row % 5)) for row in range(rows))
    return write_lines(path, ({"text": text} for text in texts))


def plan_of(checkpoint: Checkpoint, axis: str = "neuron") -> Plan:
    shapes = {name: (entry.dtype, entry.shape) for name, entry in checkpoint.entries.items()}
    return make_plan(shapes, checkpoint.config, axis=axis, overrides=None)


def make_proxy(source: Path, out: Path, *, hidden: float = 0.3, axis: str = "neuron", rescale: bool = True) -> Path:
    """A dense, unquantized proxy of a checkpoint: hidden units are zero, the others are scaled by n / |V|."""
    out.mkdir()
    with Checkpoint.open(source) as checkpoint:
        plan = plan_of(checkpoint, axis)
        groups = plan.groups()
        visible = {name: _visible(name, units, hidden) for name, units in groups.items()}
        tensors, table = {}, {}
        for tensor in plan.tensors:
            values = checkpoint.read(tensor.name)
            if tensor.masked and tensor.axis is not None:
                mask = UnitMask.of(tensor.axis, tensor.view, [visible[name] for name in tensor.groups])
                values = _masked(values, tensor.dtype, mask, rescale)
                table[tensor.name] = Units(groups=tensor.groups, axis=tensor.axis, view=tensor.view)
            tensors[tensor.name] = (values, tensor.dtype)
        _save(out / "model.safetensors", tensors)
        save_file({name: np.packbits(flags) for name, flags in visible.items()}, out / "visible.safetensors")
        for path in [source / "config.json", *checkpoint.companions]:
            shutil.copy(path, out / path.name)
    seal(out, groups, table)
    return out


def seal(out: Path, groups: Mapping[str, int], table: Mapping[str, Units]) -> None:
    """Write proxy.json over the files that lie in the folder."""
    manifest = ProxyManifest(
        proxy_id=hashlib.sha256(str(sorted(groups)).encode()).hexdigest(), job="0" * 64, round=1, quantization=None,
        fill="zero", public_base=None, rescale=True, tensors=dict(table),
        groups={name: GroupUnits(units=units) for name, units in groups.items()},
        files={path.name: file_digest(path) for path in out.iterdir() if path.name != "proxy.json"},
    )  # fmt: skip
    (out / "proxy.json").write_bytes(manifest_bytes(manifest))


def _visible(name: str, units: int, hidden: float) -> np.ndarray:
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    flags = np.ones(units, np.bool_)
    flags[np.random.default_rng(digest).permutation(units)[: round(hidden * units)]] = False
    return flags


def _masked(values: np.ndarray, dtype: str, mask: UnitMask, rescale: bool) -> np.ndarray:
    bits = values.view(np.uint16) if values.dtype == np.float16 else values
    out = bits.reshape(mask.view[0] * mask.view[1], mask.view[2]).copy()
    if rescale:
        visible, size = int(mask.marks.sum()), mask.marks.size
        kernels.scale_values(out.copy(), dtype, np.float32(size / visible), out)
    for part in range(mask.view[0]):
        rows = slice(part * mask.view[1], (part + 1) * mask.view[1])
        piece = np.ascontiguousarray(out[rows])
        mask.inverted().overwrite(piece, rows.start, None)
        out[rows] = piece
    return out.reshape(values.shape)


def _save(path: Path, tensors: Mapping[str, tuple[np.ndarray, str]]) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    as_torch = {}
    for name, (values, dtype) in tensors.items():
        signed = values.view(np.int16) if values.dtype == np.uint16 else values
        tensor = torch.from_numpy(np.ascontiguousarray(signed))
        kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
        as_torch[name] = tensor.view(kinds[dtype]) if dtype in kinds else tensor
    save_torch(as_torch, path, metadata={"format": "pt"})
