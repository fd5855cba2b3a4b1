"""Reading a checkpoint: config, index and shards in, tensors out, whole or in chunks into a reused buffer.

Nothing is memory-mapped unless asked for, and at most 64 files are open at a time, however many checkpoints are. A
checkpoint that could not stay in the page cache anyway (larger than half of the memory) is dropped from it behind the
reader: that is several times faster than making the kernel search for old pages to evict.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli import strictjson
from fedqsn_cli.checkpoint.companions import find_companions
from fedqsn_cli.checkpoint.descriptors import DESCRIPTORS, StoredFile
from fedqsn_cli.checkpoint.files import read_file
from fedqsn_cli.checkpoint.header import (
    MAX_NAME,
    Header,
    TensorEntry,
    is_plain_file_name,
    name_problem,
    read_header,
)
from fedqsn_cli.checkpoint.model_config import check_config
from fedqsn_cli.dtypes import DTYPES
from fedqsn_cli.errors import FormatError, InputError

MAX_JSON_BYTES = 100_000_000

_CONVERT = "convert to safetensors first (save_pretrained writes them)"
_PICKLE = "pickled weights, which are never loaded", _CONVERT
FOREIGN = {  # by suffix: what a folder holds in place of safetensors files, and what to do
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt", ".pkl"), _PICKLE),
    ".gguf": ("weights for llama.cpp (GGUF)", "give the checkpoint that they were converted from"),
    ".h5": ("weights for TensorFlow", _CONVERT),
    ".msgpack": ("weights for Flax", _CONVERT),
    ".onnx": ("an ONNX graph", "give the checkpoint that it was exported from"),
    ".arrow": ("a data set", "give a model; data goes to --data"),
    ".parquet": ("a data set", "give a model; data goes to --data"),
}
_ADAPTER = "adapter_config.json"
_NO_ADAPTER = ("update.json", "model.safetensors", "model.safetensors.index.json")  # more than an adapter, then
_MERGE_ADAPTER = (
    'merge it into its base first: python -c "from peft import {loader} as A; '
    "A.from_pretrained('{folder}').merge_and_unload().save_pretrained('merged')\""
)


class Checkpoint:
    """A model directory, or one safetensors file.

    Attributes:
        path: what was opened.
        config: parsed config.json, None for a single file or a directory without one.
        entries: every tensor in sequential reading order: shards by file name, then the order within the file.
        files: the files that they are in.
        metadata: the `__metadata__` of all files; where two files differ, the first one counts.
        manifest: parsed fedqsn.json, None if there is none.
        proxy_manifest: parsed proxy.json, None if there is none.
        companions: tokenizer and generation files that belong to the model.
    """

    def __init__(self, path: Path, headers: Iterable[Header]) -> None:
        self.path = path
        self.config: dict[str, Any] | None = None
        self.manifest: dict[str, Any] | None = None
        self.proxy_manifest: dict[str, Any] | None = None
        self.companions: list[Path] = []
        self.entries: dict[str, TensorEntry] = {}
        self.metadata: dict[str, str] = {}
        self.files: dict[Path, StoredFile] = {}
        self._mappings: dict[Path, mmap.mmap] = {}
        for header in headers:
            self._add(header)
        if hasattr(os, "posix_fadvise") and self.total_bytes > _memory_bytes() // 2:
            for file in self.files.values():
                file.drop_behind = True

    def _add(self, header: Header) -> None:
        for name, entry in header.entries.items():
            if name in self.entries:
                other = self.entries[name].file.name
                raise FormatError(f"tensor {name!r} is in {other} too", where=entry.file)
            self.entries[name] = entry
            self.files.setdefault(entry.file, StoredFile(entry.file, header.identity))
        self.metadata = header.metadata | self.metadata

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a checkpoint and check all headers; no tensor is read.

        Args:
            path: a directory with model.safetensors, with an index and its shards, or with exactly one
                .safetensors file; or one .safetensors file.

        Raises:
            InputError: nothing there that can be read as safetensors.
            FormatError: a header, the index or a JSON file is malformed.
        """
        path = Path(path)
        if not path.is_dir():
            return cls(path, [read_header(path)])
        _refuse_adapter(path)
        checkpoint = cls(path, _directory_headers(path))
        checkpoint.config = _read_json(path / "config.json")
        if checkpoint.config is not None:
            sizes = {name: entry.nbytes for name, entry in checkpoint.entries.items()}
            check_config(checkpoint.config, sizes, path / "config.json")
        checkpoint.manifest = _read_json(path / "fedqsn.json")
        checkpoint.proxy_manifest = _read_json(path / "proxy.json")
        checkpoint.companions = find_companions(path)
        return checkpoint

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(entry.nbytes for entry in self.entries.values())

    def read(self, name: str) -> NDArray[Any]:
        """Read a whole tensor into a fresh array.

        Returns:
            A C-contiguous array of the stored shape. BF16 comes as uint16 and F8 as uint8: the raw bits.

        Raises:
            KeyError: there is no such tensor.
            FormatError: the file got shorter or changed since it was opened, or a BOOL is neither 0 nor 1.
        """
        entry = self.entries[name]
        raw: NDArray[np.uint8] = np.empty(entry.nbytes, np.uint8)
        self.read_into(name, 0, raw)
        if entry.dtype == "BOOL" and raw.size and raw.max() > 1:
            raise FormatError("a BOOL is neither 0 nor 1", where=f"{entry.file}: {name}")
        return raw.view(DTYPES[entry.dtype].numpy).reshape(entry.shape)

    def mapped(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor, mapped: a page takes memory once it is used, and the kernel may drop it again.

        Who writes to them changes a copy, never the file. For programs that hold a model as long as they run; a file
        that gets shorter meanwhile ends them.

        Raises:
            FormatError: the file changed since it was opened.
        """
        entry = self.entries[name]
        mapping = self._mappings.get(entry.file)
        if mapping is None:
            with DESCRIPTORS.borrow(entry.file, self.files[entry.file].identity) as descriptor:
                mapping = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
            self._mappings[entry.file] = mapping
        return np.frombuffer(mapping, np.uint8, entry.nbytes, entry.start)

    def read_into(self, name: str, start: int, out: memoryview | NDArray[Any]) -> None:
        """Fill `out` with the bytes [start, start + size of out) of a tensor.

        Args:
            out: a writable C-contiguous buffer of any dtype, meant to be used again and again.

        Raises:
            FormatError: the file got shorter or changed since it was opened.
        """
        view = byte_view(out)
        file, begin = self._place(name, start, len(view))
        if file.read_into(begin, view) < len(view):
            raise FormatError("truncated while it was read", where=f"{file.path}: {name}")

    def read_fresh(self, name: str, start: int, count: int) -> NDArray[np.uint8]:
        """The bytes [start, start + count) of a tensor in a fresh array, past the page cache where they are not in it.

        Raises:
            FormatError: the file got shorter or changed since it was opened.
        """
        file, begin = self._place(name, start, count)
        return _complete(file.read(begin, count), count, file, name)

    def view(self, name: str, start: int, count: int) -> NDArray[np.uint8]:
        """As `read_fresh`, but not to be written to: others who were promised these bytes may share them."""
        file, begin = self._place(name, start, count)
        return _complete(file.view(begin, count), count, file, name)

    def expect(self, name: str, start: int, count: int) -> None:
        """Begin to read bytes that `view` or `read_fresh` will be asked for."""
        file, begin = self._place(name, start, count)
        file.expect(begin, count)

    def _place(self, name: str, start: int, count: int) -> tuple[StoredFile, int]:
        """The file that these bytes of a tensor are in, and where."""
        entry = self.entries[name]
        if start < 0 or start + count > entry.nbytes:
            raise ValueError(f"bytes [{start}, {start + count}) are outside of {name!r} ({entry.nbytes} bytes)")
        return self.files[entry.file], entry.start + start

    def close(self) -> None:
        """Close the files of this checkpoint; a later read opens them again. Mapped bytes stay."""
        self._mappings.clear()
        for file in self.files.values():
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _complete(found: NDArray[np.uint8], count: int, file: StoredFile, name: str) -> NDArray[np.uint8]:
    if found.size < count:
        raise FormatError("truncated while it was read", where=f"{file.path}: {name}")
    return found


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def byte_view(data: memoryview | bytes | NDArray[Any]) -> memoryview:
    """See a C-contiguous buffer of any dtype and shape as plain bytes, without a copy."""
    if isinstance(data, np.ndarray):
        if not data.flags.c_contiguous:
            raise ValueError("the array is not C-contiguous")
        data = data.reshape(-1).view(np.uint8).data
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")


def _refuse_adapter(folder: Path) -> None:
    """Refuse the folder that peft writes for an adapter: it has no model's weights. Raises InputError."""
    if not os.path.lexists(folder / _ADAPTER) or any(os.path.lexists(folder / name) for name in _NO_ADAPTER):
        return
    task = (_read_json(folder / _ADAPTER) or {}).get("task_type")
    loader = {"SEQ_CLS": "AutoPeftModelForSequenceClassification", "CAUSAL_LM": "AutoPeftModelForCausalLM"}
    hint = _MERGE_ADAPTER.format(loader=loader.get(str(task), "AutoPeftModel"), folder=folder)
    raise InputError("this is a LoRA adapter, not a model", where=folder, hint=hint)


def _directory_headers(folder: Path) -> list[Header]:
    """Headers of the checkpoint in a directory, in shard order."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    indices = [index] if index.exists() else sorted(folder.glob("*.safetensors.index.json"))
    if single.exists() and index.exists():
        raise InputError("holds both model.safetensors and an index", where=folder, hint="remove one of them")
    if single.exists():
        return [read_header(single)]
    if len(indices) == 1:
        return _sharded_headers(indices[0])
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1 and not indices:
        return [read_header(files[0])]
    if files or indices:
        raise InputError("holds several safetensors files and no single index", where=folder)
    for file in sorted(folder.iterdir()):
        if file.suffix in FOREIGN:
            what, hint = FOREIGN[file.suffix]
            raise InputError(f"holds no safetensors file, only {what}", where=folder, hint=hint)
    raise InputError("holds no safetensors file", where=folder)


def _sharded_headers(index: Path) -> list[Header]:
    """Headers of all shards of an index, which must agree with it tensor for tensor."""
    document = _read_json(index) or {}
    weight_map = document.get("weight_map")
    if type(weight_map) is not dict or not weight_map:
        raise FormatError("weight_map is not an object that names tensors", where=index)
    tensors: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if problem := name_problem(name):
            raise FormatError(f"tensor name {name[:MAX_NAME]!r} {problem}", where=index)
        if not is_plain_file_name(file) or not file.endswith(".safetensors"):
            raise FormatError(
                f"weight_map sends {name!r} to {file!r}, which is not a file of this directory", where=index
            )
        tensors.setdefault(file, set()).add(name)
    headers = []
    for file in sorted(tensors):
        header = read_header(index.parent / file)
        _check_shard(tensors[file], set(header.entries), index, file)
        headers.append(header)
    return headers


def _check_shard(listed: set[str], stored: set[str], index: Path, file: str) -> None:
    for name in sorted(listed - stored):
        raise FormatError(f"tensor {name!r} is not in {file}", where=index)
    for name in sorted(stored - listed):
        raise FormatError(f"tensor {name!r} of {file} is not in the index", where=index)


def _read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file, None if there is no such file."""
    if not os.path.lexists(path):
        return None
    document = strictjson.loads(read_file(path, MAX_JSON_BYTES), path)
    if type(document) is not dict:
        raise FormatError("not a JSON object", where=path)
    return document
