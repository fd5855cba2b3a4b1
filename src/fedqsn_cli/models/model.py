"""A checkpoint as the owner's model sees it: packed tensors under their own names, with the plan and the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.artifacts.manifests import ModelManifest, Quantization, read_manifest
from fedqsn_cli.checkpoint import Checkpoint, Source, resolve
from fedqsn_cli.dtypes import DTYPES, FROM_TORCH, WEIGHT_DTYPES
from fedqsn_cli.errors import FormatError, InputError
from fedqsn_cli.planning.plan import Plan, make_plan
from fedqsn_cli.planning.roles import rules
from fedqsn_cli.quantization.bnb_format import Packing, quantization_config
from fedqsn_cli.quantization.bnb_reader import find_packings, read_scales
from fedqsn_cli.quantization.layout import TensorLayout
from fedqsn_cli.quantization.scales import Scales

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class ModelTensor:
    """One tensor of the model: its dtype and shape before packing, and how it is packed (None: it is not)."""

    dtype: str
    shape: tuple[int, ...]
    packing: Packing | None

    @property
    def is_float(self) -> bool:
        """Does it hold weights, not positions or flags?"""
        return self.dtype in WEIGHT_DTYPES


@dataclass
class OpenModel:
    """An opened checkpoint with its plan; `manifest` is None for a model that fedqsn did not make."""

    source: Source
    checkpoint: Checkpoint
    manifest: ModelManifest | None
    tensors: dict[str, ModelTensor]
    plan: Plan
    _scales: dict[str, Scales] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """global-model, server-model or masked-model."""
        return self.manifest.kind if self.manifest else "global-model"

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json; empty for a single file."""
        return self.checkpoint.config or {}

    @property
    def is_quantized(self) -> bool:
        """Does it hold quantized values already?"""
        return self.manifest is not None and self.manifest.quantization is not None

    @property
    def has_trained_fill(self) -> bool:
        """Did clients train what fills its holes, so that it is no longer the public base?"""
        return self.manifest is not None and self.manifest.kind == "server-model" and bool(self.manifest.trained_fill)

    @property
    def config_dtype(self) -> str:
        """The dtype that config.json names, as safetensors spells it; F32 when it names none."""
        text = self.config.get("dtype") or self.config.get("torch_dtype") or "float32"
        return FROM_TORCH.get(str(text).removeprefix("torch."), "F32")

    def quantization_config(self, quantization: Quantization | None) -> dict[str, Any] | None:
        """`quantization_config` of config.json for weights packed as bitsandbytes does; None for all others."""
        if quantization is None or quantization.layout != "bnb":
            return None
        skip = self.plan.skip_modules(self.checkpoint.config)
        return quantization_config(
            quantization.format, quantization.block_size, quantization.double_quant, skip, self.config_dtype
        )

    def stored_bytes(self, name: str) -> int:
        """Bytes of the tensor's values or codes in the file."""
        return self.checkpoint.entries[name].nbytes

    def read_rows(self, name: str, storage: TensorLayout, first: int, rows: int) -> Array:
        """Read whole rows of the working view into a fresh array; tensors that are worked on transposed come whole.

        Returns:
            Stored float bits [rows, cols] (16-bit floats as uint16; a transposed tensor as it is stored), int8 codes
            [rows, cols], packed 4-bit codes [rows * cols / 2], or the opaque values of any other dtype.
        """
        logical, cols = self.tensors[name], storage.view[2]
        found = self.checkpoint.read_fresh(name, *self._span(name, storage, first, rows))
        if logical.packing is not None and logical.packing.kind == "pack4":
            return found
        turned = storage.transposed and logical.packing is None
        values = found.view(array_dtype(self.checkpoint.entries[name].dtype))
        return values.reshape((cols, rows) if turned else (rows, cols))

    def expect_rows(self, name: str, storage: TensorLayout, first: int, rows: int) -> None:
        """Begin to read what `read_rows` will be asked for."""
        self.checkpoint.expect(name, *self._span(name, storage, first, rows))

    def _span(self, name: str, storage: TensorLayout, first: int, rows: int) -> tuple[int, int]:
        """Where rows are in the bytes of a tensor, and how many bytes they are."""
        entry, packing, cols = self.checkpoint.entries[name], self.tensors[name].packing, storage.view[2]
        if packing is not None and packing.kind == "pack4":
            begin = first * cols // 2
            return begin, min(entry.nbytes, begin + (rows * cols + 1) // 2) - begin
        size = array_dtype(entry.dtype).itemsize
        return first * cols * size, rows * cols * size

    def scales(self, name: str) -> Scales:
        """Block scales of a packed tensor."""
        found = self._scales.get(name)
        if found is None:
            found = read_scales(self.checkpoint, name)
            self._scales = {name: found}  # passes read tensor by tensor; of several threads, each has what it found
        return found


def array_dtype(dtype: str) -> np.dtype[Any]:
    """numpy's type for stored values: floats as raw bits, int8 codes, anything else as opaque bytes."""
    if dtype in WEIGHT_DTYPES:
        return np.dtype(DTYPES[dtype].bits)
    return np.dtype(np.int8) if dtype == "I8" else np.dtype(f"V{DTYPES[dtype].nbytes}")


def open_model(reference: str, *, axis: str = "neuron", overrides: dict[str, Any] | None = None) -> OpenModel:
    """Open a model that the owner may work with: a global, server or quantized model, never a proxy or an update.

    Args:
        reference: a path or hf:// reference.
        axis, overrides: decide the plan of a model without a manifest; a manifest brings its own.

    Raises:
        InputError: there is no such model, or it is an artifact of another kind. FormatError: it is malformed.
        PlanError: the plan cannot be made.
    """
    source, checkpoint, manifest = open_source(reference)
    if manifest is not None and manifest.kind != "global-model":
        axis, overrides = manifest.axis, manifest.overrides
    tensors = model_tensors(checkpoint)
    if manifest is None and any(tensor.packing is not None for tensor in tensors.values()):
        raise InputError("this model was quantized elsewhere", where=reference, hint="start from its dense checkpoint")
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    plan = make_plan(shapes, checkpoint.config, axis=axis, overrides=overrides)
    if manifest is not None:
        _check_quantization(manifest.quantization, plan, tensors, source.path / manifest.FILE)
    return OpenModel(source, checkpoint, manifest, tensors, plan)


def _check_quantization(
    said: Quantization | None, plan: Plan, tensors: Mapping[str, ModelTensor], where: object
) -> None:
    """Refuse a manifest that says otherwise than the tensors how they are packed. Raises FormatError."""
    packed = said is not None and said.layout == "bnb"
    for planned in plan.tensors:
        packing = tensors[planned.name].packing
        if (packing is not None) != (packed and planned.quantized and planned.packable):
            what = f"tensor {planned.name} is {'packed' if packing else 'not packed'}, which field quantization denies"
            raise FormatError(what, where=where)
        if packing is not None and said is not None and not _is_as_said(packing, said):
            raise FormatError(f"tensor {planned.name} is packed otherwise than field quantization says", where=where)


def _is_as_said(packing: Packing, said: Quantization) -> bool:
    same_block = packing.kind == "pack8" or packing.block == said.block_size
    return packing.format == said.format and same_block and packing.double == said.double_quant


def open_source(reference: str) -> tuple[Source, Checkpoint, ModelManifest | None]:
    """Find and open what may be an owner's model, with its `fedqsn.json` if there is one. Raises as `open_model`."""
    source = resolve(str(reference))
    checkpoint = Checkpoint.open(source.path)
    if checkpoint.proxy_manifest is not None:
        raise InputError("this is a proxy", where=reference, hint="give the global model or the server model")
    if (source.path / "update.json").is_file():
        raise InputError("this is an update", where=reference, hint="give the global model or the server model")
    manifest = read_manifest(source.path, ModelManifest) if checkpoint.manifest is not None else None
    return source, checkpoint, manifest


def model_tensors(checkpoint: Checkpoint) -> dict[str, ModelTensor]:
    """The tensors of the model that a checkpoint holds, packed ones under their own names. Raises FormatError."""
    packings = find_packings(checkpoint)
    companions = {name for packing in packings.values() for name in packing.companions}
    model_type = (checkpoint.config or {}).get("model_type")
    tensors = {}
    for name, entry in checkpoint.entries.items():
        packing = packings.get(name)
        if packing is not None:
            tensors[name] = ModelTensor(packing.dtype, _stored_shape(name, packing, model_type), packing)
        elif name not in companions:
            tensors[name] = ModelTensor(entry.dtype, entry.shape, None)
    return tensors


def _stored_shape(name: str, packing: Packing, model_type: str | None) -> tuple[int, ...]:
    """Shape before packing: bitsandbytes turns a Conv1D weight [in, out] to [out, in]."""
    role = rules().role(name, 2, model_type)
    return packing.shape[::-1] if role is not None and role.name == "conv1d" else packing.shape
