"""Small jobs for the tests of a client's side: checkpoints with a tokenizer, proxies of them, and data files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fedqsn_cli import export_proxy
from fedqsn_cli.artifacts.manifests import ProxyManifest, read_manifest
from fedqsn_cli.checkpoint import Checkpoint
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.models.dense import load_dense
from fedqsn_cli.training.steps.visible import expanded, read_visible
from support.families import build
from support.keys import known_key


def small_model(folder: Path, name: str = "bert", **options: Any) -> Path:
    """A tiny checkpoint with a tokenizer of words w3 ... w96."""
    return build(name, folder, tokenizer=True, **options)


def make_proxy(source: Path, out: Path, *, p1: float = 0.2, p2: float = 0.2, **options: Any) -> Path:
    """A proxy of a checkpoint for client "a", the same in every run; not quantized unless options say so."""
    given = {"format": "none", "key": out.parent / "key", "ledger": out.parent / f"{out.name}.jsonl", **options}
    with known_key():
        export_proxy(str(source), out, client=["a"], round=1, p1=p1, p2=p2, **given)
    return out


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


def data_for(head: str, folder: Path) -> Path:
    """Training data for a model class. T5 wants one end-of-text id, which here is that of unknown words."""
    if "Classification" not in head:
        return plain_texts(folder / "texts.jsonl")
    path = labelled(folder / "labelled.jsonl")
    if head.startswith("T5"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        write_lines(path, ({**row, "text": row["text"] + " end"} for row in rows))
    return path


def dense_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model or proxy as load_dense gives them."""
    with Checkpoint.open(folder) as checkpoint:
        return load_dense(checkpoint)


def visible_units(proxy: Path) -> dict[str, UnitMask]:
    """Visible units of the masked tensors of a proxy."""
    shapes = {name: tuple(tensor.shape) for name, tensor in dense_tensors(proxy).items()}
    return read_visible(proxy, read_manifest(proxy, ProxyManifest), shapes)


def whole_update(proxy: Path, update: Path) -> dict[str, Tensor]:
    """An update in the tensors' own shapes, fp32, with zeros where the proxy shows nothing."""
    stored = load_file(update / "update.safetensors")
    visible = visible_units(proxy)
    whole = {}
    for name, tensor in dense_tensors(proxy).items():
        if tensor.is_floating_point():
            whole[name] = torch.zeros(tensor.shape)
            mask = torch.ones(tensor.shape, dtype=torch.bool)
            if name in visible:
                mask = expanded(visible[name], tuple(tensor.shape))
            whole[name][mask] = stored[name].float().reshape(-1)
    return whole
