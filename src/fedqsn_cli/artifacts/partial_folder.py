"""A partial sum: what some updates of a round add up to, on its way to the merge of all of them.

    partial.json           whose updates are in it, and what was measured of each; sealed with the job's key
    partial.safetensors
        NAME.sum           I64 [rows, 2, cols]: of each float tensor of the model, rows of all lead slices one after the
                           other; the sum of n_k Δ_k of a weight is [:, 0] * 2^-16 + [:, 1] * 2^-64
        NAME.weights       I64 [units]: the sum of n_k over the clients that saw a unit; [1] for a tensor without units

It is the owner's, and as private as the updates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from fedqsn_cli.artifacts.document import Digest, FileName, Manifest, PositiveNumber, Sha256, Strict
from fedqsn_cli.artifacts.ledger import ClientId
from fedqsn_cli.artifacts.ledger_head import Sealer
from fedqsn_cli.artifacts.manifests import manifest_bytes
from fedqsn_cli.checkpoint import TensorSpec
from fedqsn_cli.planning.tensor_plan import TensorPlan, UnitAxis, View, units_per_slice

PARTIAL_MANIFEST = "partial.json"
PARTIAL_TENSORS = "partial.safetensors"

SUM, WEIGHTS = ".sum", ".weights"
"""What the names of its tensors end with."""

_UNSEALED = "0" * 64

NotNegative = Annotated[float, Field(ge=0)]


class MovementRecord(Strict):
    """What of a model an update moves furthest, and how far in proportion to the weights there."""

    tensor: str
    unit: Annotated[int, Field(ge=0)] | None = None
    ratio: NotNegative


class SummedClient(Strict):
    """One update in a partial sum: whose it is, and what was measured of it.

    Args:
        factor: what Δ was multiplied by, to clip it. norm: of Δ. relative_norm: the same over the model's.
        coverage: share of all parameters that it trained.
    """

    client: ClientId
    proxy_id: Sha256
    num_examples: Annotated[int, Field(ge=1, le=2**53)]
    factor: Annotated[float, Field(gt=0, le=1)]
    norm: NotNegative
    relative_norm: NotNegative
    coverage: Annotated[float, Field(ge=0, le=1)]
    largest_tensor: MovementRecord
    largest_unit: MovementRecord
    first_loss: float | None
    last_loss: float | None


class PartialManifest(Manifest):
    """`partial.json`.

    Args:
        model_digest: of the model that the sum is for. clip_norm: that of the merge.
        signed: whether every update was signed by its client.
        seal: HMAC, with the job's key, of everything else here; so only who has the key can make partial sums.
    """

    FILE = PARTIAL_MANIFEST
    NAME = "a partial sum"
    HINT = "make a partial sum with 'fedqsn merge --partial'"

    format: Literal["fedqsn-partial/1"] = "fedqsn-partial/1"
    job: Sha256
    plan: Sha256
    model_digest: Digest
    clip_norm: PositiveNumber | None
    signed: bool
    clients: tuple[SummedClient, ...] = Field(strict=False, min_length=1)
    files: dict[FileName, Digest]
    seal: Sha256 = _UNSEALED

    def sealed(self, job: Sealer) -> PartialManifest:
        """The same with its seal."""
        unsealed = self.model_copy(update={"seal": _UNSEALED})
        digest = hashlib.sha256(manifest_bytes(unsealed)).hexdigest()
        return self.model_copy(update={"seal": job.seal("partial sum", digest)})


@dataclass(frozen=True, slots=True)
class Run:
    """Some units of a tensor: `count` of them from number `first` on."""

    first: int
    count: int


def unit_run(axis: UnitAxis | None, view: View, first: int, rows: int) -> Run:
    """The units that rows `first` .. `first + rows` of a tensor belong to; rows of one lead slice if units are columns.

    Args:
        view: (lead, rows, cols) of the tensor.
    """
    _, height, cols = view
    runs: dict[UnitAxis | None, Run] = {
        None: Run(0, 1),
        "row": Run(first, rows),
        "column": Run(first // max(height, 1) * cols, cols),
        "element": Run(first * cols, rows * cols),
    }
    return runs[axis]


def partial_specs(tensors: Sequence[TensorPlan]) -> Iterator[TensorSpec]:
    """The tensors of a partial sum, in the order of writing.

    Args:
        tensors: the float tensors of the model, in the order of the pass.
    """
    for tensor in tensors:
        lead, rows, cols = tensor.view
        units = 1 if tensor.axis is None else lead * units_per_slice(tensor.axis, tensor.view)
        yield TensorSpec(tensor.name + SUM, "I64", (lead * rows, 2, cols))
        yield TensorSpec(tensor.name + WEIGHTS, "I64", (units,))
