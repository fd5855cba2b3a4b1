"""The manifests of models, proxies and updates: as data, and read without trust.

fedqsn.json   in a model that stays with the owner (server model, quantized model, merged model)
proxy.json    in a proxy: holds nothing that its reader could not find in the weights
update.json   in an update
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, model_validator

from fedqsn_cli import strictjson
from fedqsn_cli.artifacts.document import (
    BlockSize,
    Count,
    Digest,
    FileName,
    Manifest,
    PositiveNumber,
    ServerRatio,
    Sha256,
    ShortText,
    Strict,
    problem,
)
from fedqsn_cli.checkpoint.files import open_regular_file, read_file
from fedqsn_cli.errors import InputError, OutputExists
from fedqsn_cli.planning.tensor_plan import MaskAxis, TensorPlan, UnitAxis

if TYPE_CHECKING:
    from fedqsn_cli.checkpoint import Source
    from fedqsn_cli.planning.plan import Plan

MODEL_MANIFEST = "fedqsn.json"
PROXY_MANIFEST = "proxy.json"
UPDATE_MANIFEST = "update.json"
SIGNATURE = "model.sig"  # of a proxy or update, in it; the reference tool calls it so, too
UPDATE_TENSORS = "update.safetensors"
ADAPTER_TENSORS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
VISIBLE_TENSORS = "visible.safetensors"


Fill = Literal["zero", "base"]
TrainsFill = Literal["all"] | None  # None: clients train visible units only, and no field is written


ShortId = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
"""The first digits of the id of a proxy: nobody without the key can choose them."""


def short_id(proxy_id: str) -> str:
    """What a merged model's manifest keeps of the id of a proxy."""
    return proxy_id[:16]


class Quantization(Strict):
    """How quantized tensors are stored: block-wise absmax codes (`bnb`) or values snapped to the grid (`dense`)."""

    format: Literal["nf4", "fp4", "int8", "nf3", "nf2"]
    block_size: BlockSize
    double_quant: bool
    layout: Literal["bnb", "dense"]


class PublicBaseRecord(Strict):
    """The public checkpoint whose units fill the holes."""

    reference: str | None  # hf://owner/name@commit; None when it was a local folder, whose path stays private
    sha256: Sha256  # content digest of the tensors used, by SHA-256


class Units(Strict):
    """The units of one tensor: their groups (one, or one for each lead slice), their axis, and (lead, rows, cols)."""

    groups: tuple[str, ...] = Field(strict=False)
    axis: UnitAxis
    view: tuple[Count, Count, Count] = Field(strict=False)


class GroupCount(Strict):
    """Size of a group: its units and how many of them the server mask hides."""

    units: Count
    hidden: Count


class SourceRecord(Strict):
    """Where a model was made from: the reference as typed and the resolved commit of a hub repository."""

    reference: str
    revision: str | None

    @classmethod
    def of(cls, source: Source) -> SourceRecord:
        """The record of an opened source."""
        return cls(reference=source.reference, revision=source.revision)


class ServerStateRecord(Strict):
    """Which state of a server optimizer belongs to a merged model.

    Args:
        merged_into: content digest of the model before; the state has it, too. model: that of the merged model.
    """

    optimizer: Literal["momentum", "adam", "yogi", "adagrad"]
    merged_into: Digest
    model: Digest


class ModelManifest(Manifest):
    """`fedqsn.json`: what a model that stays with the owner is. Private, but holds no secret."""

    FILE = MODEL_MANIFEST
    NAME = "a model of the owner"
    HINT = "make a server model with 'fedqsn mask'"

    format: Literal["fedqsn-model/1", "fedqsn-model/2"] = "fedqsn-model/2"  # 1: before digests by BLAKE3
    kind: Literal["global-model", "server-model", "masked-model"]
    job: Sha256 | None
    p1: ServerRatio
    axis: MaskAxis
    rescale: bool
    fill: Fill
    public_base: PublicBaseRecord | None
    plan: Sha256
    overrides: dict[str, object]  # the user's plan rules, so that later commands need no --plan-file
    model_digest: Digest | None
    quantization: Quantization | None
    groups: dict[str, GroupCount]
    tensors: dict[str, Units]
    source: SourceRecord
    trained_fill: Literal[True] | None = None  # clients trained the public base's units in the holes
    server_state: ServerStateRecord | None = None
    merged: tuple[ShortId, ...] | None = Field(default=None, strict=False)  # updates, by their proxies, of all rounds

    @model_validator(mode="after")
    def _groups_are_listed(self) -> Self:
        for name, units in self.tensors.items():
            if not units.groups or not self.groups.keys() >= set(units.groups):
                raise problem(f"tensor {name!r} has no group, or one that is not listed")
        for name, group in self.groups.items():
            if not 0 < group.units >= group.hidden:
                raise problem(f"group {name!r} hides {group.hidden} of {group.units} units")
        return self

    @property
    def described(self) -> str:
        """What kind of model this is, in words."""
        return _described(self.kind, self.quantization)

    @classmethod
    def of(cls, plan: Plan, source: Source, **differs: Any) -> ModelManifest:
        """The manifest of a dense global model without a job, except for the fields in `differs`."""
        defaults = {
            "kind": "global-model",
            "job": None,
            "p1": 0.0,
            "axis": plan.axis,
            "rescale": False,
            "fill": "zero",
            "public_base": None,
            "plan": plan.digest,
            "overrides": plan.overrides,
            "model_digest": None,
            "quantization": None,
            "groups": {},
            "tensors": {},
            "source": SourceRecord.of(source),
        }
        return cls.model_validate(defaults | differs)


def merged_before(manifest: ModelManifest | None, job: str) -> frozenset[str]:
    """Which updates of a job are in a model, by the short ids of their proxies, as far as its manifest knows.

    Args:
        job: commitment to its key.
    """
    return frozenset(manifest.merged or ()) if manifest is not None and manifest.job == job else frozenset()


def require_same_kind(out: str | Path, kind: str, quantization: Quantization | None = None) -> None:
    """Refuse to replace a model of another kind, such as a trained server model by what it is restored to.

    Args:
        out: where a model is about to be written. kind, quantization: of that model.

    Raises:
        OutputExists: there is another kind of model. FormatError: there is a model whose manifest is malformed.
    """
    path = Path(os.path.abspath(out))
    if not os.path.isfile(path / MODEL_MANIFEST):
        return
    found, wanted = read_manifest(path, ModelManifest).described, _described(kind, quantization)
    if found != wanted:
        raise OutputExists(f"already exists, and is a {found}, not a {wanted}", where=path, hint="choose another path")


def _described(kind: str, quantization: Quantization | None) -> str:
    words = kind.replace("-", " ")
    return words if quantization is None else f"quantized {words}"


class GroupUnits(Strict):
    """Size of a group in a proxy, in units."""

    units: Count


class ProxyManifest(Manifest):
    """`proxy.json`: what a client needs to train and answer. Holds no key, client id, path, host name or time."""

    FILE = PROXY_MANIFEST
    NAME = "a proxy"
    HINT = "make a proxy with 'fedqsn export-proxy'"

    format: Literal["fedqsn-proxy/1"] = "fedqsn-proxy/1"
    proxy_id: Sha256
    job: Sha256
    round: Count
    quantization: Quantization | None
    fill: Fill
    public_base: PublicBaseRecord | None
    rescale: bool
    groups: dict[str, GroupUnits]
    tensors: dict[str, Units]
    train: TrainsFill = None
    files: dict[FileName, Sha256]


class Losses(Strict):
    """Training losses in nats, as the client reports them."""

    first: float | None
    last: float | None
    eval_before: float | None
    eval_after: float | None


class TrainingPrivacy(Strict):
    """Differential privacy of single examples: DP-SGD with Poisson sampling, as the client reports it."""

    epsilon: PositiveNumber
    delta: Annotated[float, Field(gt=0, lt=1)]
    clip: PositiveNumber
    noise_multiplier: PositiveNumber
    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    steps: Count
    accountant: Literal["rdp"]


class UpdatePrivacy(Strict):
    """Clipping of the update as a whole and noise on it, as the client reports it; 0 means no noise."""

    clip_norm: PositiveNumber
    noise_multiplier: Annotated[float, Field(ge=0)]


class PrivacyRecord(Strict):
    """How a client limited what its update tells about its data; a part that was not done is omitted."""

    training: TrainingPrivacy | None = None
    update: UpdatePrivacy | None = None


class AdapterRecord(Strict):
    """The adapter of one tensor: U = scaling · B A, transposed where the tensor is stored as [in, out].

    Args:
        module: the file of adapters holds A as `module`.lora_A.weight [rank, in], B as `module`.lora_B.weight
            [out, rank].
    """

    module: Annotated[str, Field(max_length=1000)]
    rank: Annotated[int, Field(ge=1, le=2**31)]
    scaling: PositiveNumber
    transposed: bool


class UpdateManifest(Manifest):
    """`update.json`: what a client says about its update. The server checks what it can and believes none of it.

    Args:
        adapters: of an update of adapters, by the name of the tensor that they change.
        saved: tensors that were trained in full beside adapters: their names in the file of adapters, which holds them
            as they are after training.
    """

    FILE = UPDATE_MANIFEST
    NAME = "an update"
    HINT = "make an update with 'fedqsn client-train'"
    LARGEST = 1 << 24  # a model of 700 billion parameters has 50,000 matrices that may have an adapter

    format: Literal["fedqsn-update/1", "fedqsn-update/2"] = "fedqsn-update/2"  # 1: before digests by BLAKE3
    proxy_id: Sha256
    proxy_sha256: Sha256
    num_examples: Annotated[int, Field(ge=1, le=2**53)]
    steps: Count
    losses: Losses
    precision: Literal["fp32", "bf16", "fp16", "int8", "nf4"]
    tool: ShortText
    privacy: PrivacyRecord | None = None
    adapters: dict[str, AdapterRecord] | None = None
    saved: dict[str, str] | None = None
    files: dict[FileName, Digest]


def unit_table(tensors: Iterable[TensorPlan]) -> dict[str, Units]:
    """The units of each masked tensor, by its name."""
    return {t.name: Units(groups=t.groups, axis=t.axis, view=t.view) for t in tensors if t.axis is not None}


Kind = TypeVar("Kind", bound=Manifest)


def read_manifest(folder: Path, kind: type[Kind]) -> Kind:
    """Read and validate the manifest of class `kind` in `folder`.

    Raises:
        InputError: the folder or the manifest is missing. FormatError: the manifest is malformed.
    """
    path = folder / kind.FILE
    if not os.path.lexists(path):
        raise missing_manifest(folder, kind)
    return parse_manifest(read_file(path, kind.LARGEST), kind, path)


def missing_manifest(folder: Path, kind: type[Manifest]) -> InputError:
    """The error for a path that has no manifest of class `kind`: it says what is there instead."""
    what, hint = f"no {kind.FILE} here", kind.HINT
    others = [other.NAME for other in Manifest.__subclasses__() if os.path.lexists(folder / other.FILE)]
    if not os.path.isdir(folder):
        what = "is not a folder" if os.path.lexists(folder) else "there is no such folder"
    elif others:
        what = f"this is {others[0]}, not {kind.NAME}"
    elif any(folder.glob(f"*/{kind.FILE}")):
        what, hint = f"no {kind.FILE} here, only in folders in it", "name those folders"
    return InputError(what, where=folder, hint=hint)


def parse_manifest(data: bytes, kind: type[Kind], where: object) -> Kind:
    """Validate the bytes of a manifest of class `kind`. Raises FormatError."""
    return kind.from_document(strictjson.loads(data, where), where)


def manifest_bytes(manifest: Manifest) -> bytes:
    """The text of a manifest: indented JSON with sorted keys; equal manifests give equal bytes."""
    return strictjson.pretty(manifest.model_dump(mode="json")).encode()


def file_digest(path: Path) -> str:
    """SHA-256 of a plain file's bytes, in hexadecimal. Raises InputError."""
    with open(open_regular_file(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
