"""Stored numbers and safetensors files, read and written with numpy alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BITS: dict[str, Any] = {
    "F32": np.uint32,
    "F16": np.uint16,
    "BF16": np.uint16,
    "I64": np.int64,
    "U8": np.uint8,
    "I8": np.int8,
    "F64": np.float64,
}
ORDER = ("I64", "F64", "F32", "BF16", "F16", "I8", "U8")  # in which the safetensors library sorts dtypes


def to_floats(bits: Array, dtype: str) -> NDArray[np.float32]:
    """Stored bits as fp32 values."""
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16).astype(np.float32) if dtype == "F16" else bits.view(np.float32)


def to_bits(values: Array, dtype: str) -> Array:
    """fp32 values as stored bits, rounded to nearest, ties to even. Not for NaN."""
    wide = np.ascontiguousarray(values, np.float32)
    if dtype == "F32":
        return wide.view(np.uint32)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return wide.astype(np.float16).view(np.uint16)
    raw = wide.view(np.uint32)
    return ((raw + np.uint32(0x7FFF) + ((raw >> 16) & 1)) >> 16).astype(np.uint16)


Tensors = dict[str, tuple[str, Array]]  # name -> dtype, stored bits in the tensor's shape


def write_file(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file, its tensors in the order of the library."""
    document: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    data, end = [], 0
    for name, (dtype, bits) in sorted(tensors.items(), key=lambda item: (ORDER.index(item[1][0]), item[0])):
        document[name] = {"dtype": dtype, "shape": list(bits.shape), "data_offsets": [end, end + bits.nbytes]}
        data.append(np.ascontiguousarray(bits).tobytes())
        end += bits.nbytes
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data))
    return path


def read_file(path: Path) -> Tensors:
    """All tensors of one safetensors file as stored bits."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    document = json.loads(data[8 : 8 + length])
    document.pop("__metadata__", None)
    tensors = {}
    for name, entry in document.items():
        begin, end = entry["data_offsets"]
        values = np.frombuffer(data[8 + length + begin : 8 + length + end], BITS[entry["dtype"]])
        tensors[name] = (entry["dtype"], values.reshape(entry["shape"]).copy())
    return tensors


def read_model(folder: Path) -> Tensors:
    """All stored tensors of a checkpoint directory, whatever its shards."""
    files = sorted(path for path in folder.glob("*.safetensors") if path.name.startswith("model"))
    return {name: tensor for path in files for name, tensor in read_file(path).items()}


def write_model(folder: Path, tensors: Tensors, config: Mapping[str, Any], *, shards: int = 1) -> Path:
    """A checkpoint directory; its tensors are dealt out to the shards in an order that has nothing to do with names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        write_file(folder / "model.safetensors", tensors, {"format": "pt"})
        return folder
    names = sorted(tensors, key=lambda name: hashlib.sha256(name.encode()).digest())
    files = {name: f"model-{index % shards + 1:05d}-of-{shards:05d}.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        write_file(folder / file, {name: tensors[name] for name in names if files[name] == file}, {"format": "pt"})
    index = {"metadata": {"total_size": sum(bits.nbytes for _, bits in tensors.values())}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
