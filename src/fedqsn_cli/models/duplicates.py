"""Copies of one tensor under two names that the plan takes for two tensors, and two that config.json takes for one.

Each would get a mask of its own, and what one hides the other would show. Tied embeddings are known to the plan; other
copies (an untied config over equal weights, a layer saved twice) can only be found by looking at the weights.
"""

from __future__ import annotations

import numpy as np
from blake3 import blake3

from fedqsn_cli.checkpoint import Checkpoint
from fedqsn_cli.dtypes import WEIGHT_DTYPES
from fedqsn_cli.errors import PlanError
from fedqsn_cli.planning.plan import Plan
from fedqsn_cli.planning.tensor_plan import TensorPlan
from fedqsn_cli.planning.tied import tie_word_embeddings

_SAMPLE = 4096  # bytes from the start and from the middle tell nearly all tensors apart
_PIECE = 1 << 22


def refuse_duplicate_tensors(checkpoint: Checkpoint, plan: Plan) -> None:
    """Refuse a model in which a masked tensor has an equal twin with another mask, or with none.

    Raises:
        PlanError: there is one.
    """
    alike: dict[tuple[str, tuple[int, ...], bytes], list[TensorPlan]] = {}
    for tensor in plan.tensors:
        sample = _sample(checkpoint, tensor)
        if sample is not None:
            alike.setdefault((tensor.dtype, _shape(tensor), sample), []).append(tensor)
    for tensors in alike.values():
        if len({tensor.groups for tensor in tensors}) > 1 and any(tensor.masked for tensor in tensors):
            _compare(checkpoint, tensors)


def false_tie(checkpoint: Checkpoint, plan: Plan) -> tuple[str, str] | None:
    """Names of two tensors that differ though config.json ties them; None where there are none.

    transformers would use one of them for both, or refuse the model.
    """
    if tie_word_embeddings(checkpoint.config or {}) is not True:
        return None
    tied: dict[tuple[str, ...], TensorPlan] = {}
    for tensor in plan.tensors:
        if len(tensor.shape) != 2 or not tensor.groups:
            continue
        first = tied.setdefault(tensor.groups, tensor)
        if first is tensor or first.shape != tensor.shape:
            continue
        if _digest(checkpoint, first.name) != _digest(checkpoint, tensor.name):
            return first.name, tensor.name
    return None


def _compare(checkpoint: Checkpoint, tensors: list[TensorPlan]) -> None:
    seen: dict[bytes, TensorPlan] = {}
    for tensor in tensors:
        twin = seen.setdefault(_digest(checkpoint, tensor.name), tensor)
        if twin.groups != tensor.groups:
            raise PlanError(
                f"holds the same weights as {twin.name} but would be masked apart from it",
                where=tensor.name,
                hint='if they are tied, say "tie_word_embeddings": true in config.json; else remove one of them',
            )


def _shape(tensor: TensorPlan) -> tuple[int, ...]:
    return tuple(size for size in tensor.shape if size != 1)


def _sample(checkpoint: Checkpoint, tensor: TensorPlan) -> bytes | None:
    """A few bytes of a tensor; None for one that is small, or constant there (initial zeros are not copies)."""
    size = checkpoint.entries[tensor.name].nbytes
    if size < 256 or not (tensor.masked or tensor.dtype in WEIGHT_DTYPES):
        return None
    count = min(_SAMPLE, size)
    out = np.empty(2 * count, np.uint8)
    checkpoint.read_into(tensor.name, 0, out[:count])
    checkpoint.read_into(tensor.name, (size - count) // 2 // 8 * 8, out[count:])
    values = out.view(np.uint32 if tensor.dtype == "F32" else np.uint16)
    return None if (values == values[0]).all() else out.tobytes()


def _digest(checkpoint: Checkpoint, name: str) -> bytes:
    digest = blake3()
    size = checkpoint.entries[name].nbytes
    for start in range(0, size, _PIECE):
        piece = memoryview(bytearray(min(_PIECE, size - start)))
        checkpoint.read_into(name, start, piece)
        digest.update(piece)
    return digest.digest()
