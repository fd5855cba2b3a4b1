"""`merge --keep-adapter`: the merged step as one adapter, for whoever keeps the model as it was beside it.

    Δ = η Σ n_k / (N s_k) · scaling_k · L_k R_k = [.. η n_k scaling_k / (N s_k) L_k ..] · [.. R_k ..]

L_k R_k is the product of client k's factors in the orientation of the stored tensor. N, the examples of the clients
that saw a unit, differs from unit to unit, so it divides rows of the left side or columns of the right one. The rank is
the sum of the clients' ranks; a smaller one keeps the largest singular values of each tensor's Δ (Eckart and Young).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli import strictjson
from fedqsn_cli.artifacts.manifests import ADAPTER_CONFIG, ADAPTER_TENSORS
from fedqsn_cli.artifacts.update_folder import PEFT_PREFIX, factor_names
from fedqsn_cli.checkpoint import ArtifactWriter, TensorSpec
from fedqsn_cli.errors import InputError
from fedqsn_cli.kernels.hash_threads import HashThreads
from fedqsn_cli.merging.results import KeptAdapter
from fedqsn_cli.merging.step.chunks import InMemorySink, Sink
from fedqsn_cli.merging.updates.adapter_config import read_config
from fedqsn_cli.merging.updates.adapters import AdapterValues
from fedqsn_cli.merging.updates.read_update import ClientUpdate, UpdateReader
from fedqsn_cli.models.tensor_task import TensorTask
from fedqsn_cli.options import MergeOptions

Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Factors:
    """Δ of one tensor as a product, left [rows, rank] times right [rank, cols].

    Args:
        dropped, squares: squared norms of what a smaller rank cut off, and of all of Δ; both zero if nothing was.
    """

    left: Doubles
    right: Doubles
    dropped: float = 0.0
    squares: float = 0.0

    def cut(self, rank: int) -> Factors:
        """The nearest product of a rank; hidden units stay exactly zero."""
        if rank >= self.left.shape[1]:
            return self
        (left, upper), (right, lower) = np.linalg.qr(self.left), np.linalg.qr(self.right.T)
        u, sizes, v = np.linalg.svd(upper @ lower.T)
        roots = np.sqrt(sizes[:rank])
        return Factors(
            (left @ u[:, :rank]) * roots * np.any(self.left, axis=1, keepdims=True),
            roots[:, None] * (v[:rank] @ right.T) * np.any(self.right, axis=0),
            float((sizes[rank:] ** 2).sum()),
            float((sizes**2).sum()),
        )


class KeptStep:
    """The step of a merge on its way into an adapter.

    Args:
        writer: of its folder. updates: all that are merged.
    """

    def __init__(
        self,
        writer: ArtifactWriter,
        updates: Sequence[ClientUpdate],
        tasks: Sequence[TensorTask],
        options: MergeOptions,
    ) -> None:
        """Check that the step can be an adapter.

        Raises:
            InputError: an update is not one of adapters, or other modules were trained in full than in the others.
        """
        self._writer = writer
        self._updates = updates
        self._options = options
        first = updates[0]
        for update in updates:
            if update.manifest.adapters is None:
                what = f"the update of client {update.client!r} is not one of adapters"
                raise InputError(what, where="--keep-adapter", hint="leave --keep-adapter out")
            if update.manifest.saved != first.manifest.saved:
                what = f"clients {first.client!r} and {update.client!r} trained different modules in full"
                raise InputError(what, where="--keep-adapter", hint="leave --keep-adapter out")
        self._config = read_config(first.folder, first.manifest)
        self._saved = first.manifest.saved or {}
        self._all_records = [dict(update.manifest.adapters or {}) for update in updates]
        self._records = {name: record for records in reversed(self._all_records) for name, record in records.items()}
        self._tasks = [task for task in tasks if task.name in self._records]
        self.saved = InMemorySink(
            [TensorSpec(t.name, t.tensor.dtype, t.plan.shape) for t in tasks if t.name in self._saved]
        )
        """What was trained in full, as it is after the merge."""

    @property
    def summed_rank(self) -> int:
        """Rank with which the adapter is exact: the sum of the clients' ranks, for the tensor where that is largest."""
        return max(
            sum(records[task.name].rank for records in self._all_records if task.name in records)
            for task in self._tasks
        )

    def publish(self, rate: float) -> KeptAdapter:
        """Write the adapter for a step of η = `rate`, after `saved` was filled."""
        rank = min(self._options.adapter_rank or self.summed_rank, self.summed_rank)
        sink = self._writer.tensors(
            ADAPTER_TENSORS.removesuffix(".safetensors"),
            list(self._specs(rank)),
            max_shard_bytes=None,
            metadata={"format": "pt"},
        )
        for name, data in self.saved.bytes.items():
            sink.write(self._saved[name], 0, data)
        dropped = squares = 0.0
        with HashThreads() as hashing:
            readers = [UpdateReader(update, hashing.queue()) for update in self._updates]
            for task in self._tasks:
                factors = self._step(task, readers, rate).cut(rank)
                dropped, squares = dropped + factors.dropped, squares + factors.squares
                for name, values in zip(self._names(task), self._stored(task, factors, rank), strict=True):
                    sink.write(name, 0, values)
        sink.close()
        self._writer.add_bytes(ADAPTER_CONFIG, strictjson.pretty(self._new_config(rank)).encode())
        error = math.sqrt(dropped / squares) if squares else 0.0
        return KeptAdapter(str(self._writer.publish()), rank, self.summed_rank, error)

    def _names(self, task: TensorTask) -> tuple[str, str]:
        return factor_names(self._records[task.name].module)

    def _specs(self, rank: int) -> Iterator[TensorSpec]:
        """The tensors of the file, in the order of writing."""
        for name, spec in self.saved.specs.items():
            yield TensorSpec(self._saved[name], spec.dtype, spec.shape)
        for task in self._tasks:
            outputs, inputs = task.plan.shape[::-1] if self._records[task.name].transposed else task.plan.shape
            for name, shape in zip(self._names(task), ((rank, inputs), (outputs, rank)), strict=True):
                yield TensorSpec(name, "F32", shape)

    def _step(self, task: TensorTask, readers: Sequence[UpdateReader], rate: float) -> Factors:
        """Δ of a tensor, of the sum of the clients' ranks."""
        lefts, rights = [], []
        for reader in readers:
            values, update = reader.update.stored[task.name], reader.update
            if isinstance(values, AdapterValues):
                left, right = values.whole(reader.read_bytes)
                lefts.append(left * (rate * update.examples * values.scaling / update.scale(task.plan)))
                rights.append(right)
        left, right = np.hstack(lefts), np.vstack(rights)
        divisors = self._divisors(task)
        if task.plan.axis == "column" and divisors.size > 1:
            return Factors(left, right / divisors)
        return Factors(left / divisors[:, None], right)

    def _divisors(self, task: TensorTask) -> Doubles:
        """N of each unit, or of all; infinite for units that no client saw."""
        examples = np.zeros(1)
        for update in self._updates:
            mask = None if update.axis(task.plan) is None else update.masks.visible(task.plan)
            examples = examples + update.examples * (1.0 if mask is None else mask.flags.reshape(-1))
        if self._options.normalize == "clients":
            examples = np.where(examples > 0, sum(update.examples for update in self._updates), 0.0)
        return np.where(examples > 0, examples, np.inf)

    def _stored(self, task: TensorTask, factors: Factors, rank: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """A [rank, in] and B [out, rank] in fp32, filled up with zeros to the common rank."""
        missing = rank - factors.left.shape[1]
        left = np.pad(factors.left, ((0, 0), (0, missing))).astype(np.float32)
        right = np.pad(factors.right, ((0, missing), (0, 0))).astype(np.float32)
        a, b = (left.T, right.T) if self._records[task.name].transposed else (right, left)
        return np.ascontiguousarray(a), np.ascontiguousarray(b)

    def _new_config(self, rank: int) -> Mapping[str, Any]:
        """peft's configuration: scaling is alpha / r = 1."""
        modules = [self._records[task.name].module.removeprefix(PEFT_PREFIX) for task in self._tasks]
        return {
            "peft_type": "LORA",
            "task_type": self._config.get("task_type"),
            "r": rank,
            "lora_alpha": rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": any(self._records[task.name].transposed for task in self._tasks),
            "target_modules": sorted(modules),
            "modules_to_save": self._config.get("modules_to_save"),
            "inference_mode": True,
            "base_model_name_or_path": None,
        }


class Tee:
    """A `Sink` that keeps some tensors in memory on their way to another one."""

    def __init__(self, sink: Sink, kept: InMemorySink) -> None:
        self._sink = sink
        self._kept = kept

    def write(self, name: str, offset: int, data: NDArray[Any]) -> None:
        """The bytes of a tensor from `offset` on."""
        self._sink.write(name, offset, data)
        if name in self._kept.specs:
            self._kept.write(name, offset, data)
