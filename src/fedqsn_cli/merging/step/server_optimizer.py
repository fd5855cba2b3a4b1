"""Server optimizers: what becomes of the round's average Δ before it is added, with a memory of earlier rounds.

    momentum   m = β₁ m + Δ                                           W' = W + η m            FedAvgM, arXiv 1909.06335
    adagrad    v = v + Δ²                                      ⎫
    adam       v = β₂ v + (1 - β₂) Δ²                          ⎬      W' = W + η m / (√v + τ)
    yogi       v = v - (1 - β₂) Δ² sign(v - Δ²)                ⎭      with m = β₁ m + (1 - β₁) Δ

(Reddi et al. 2021, arXiv 2003.00295, algorithm 2; m starts at 0 and v at τ², without bias correction.) A unit that no
client saw keeps its weight, its m and its v. Both are kept in fp32 beside the model, in a file of their own:

    fedqsn-server-state.safetensors     momentum/NAME, and for the last three variance/NAME, of every float tensor
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.artifacts.manifests import ServerStateRecord
from fedqsn_cli.checkpoint import ArtifactWriter, Checkpoint, TensorSink, TensorSpec
from fedqsn_cli.errors import FormatError, InputError
from fedqsn_cli.masks.job_key import JobKey
from fedqsn_cli.merging.step.chunks import ModelChunk
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.models.tensor_task import TensorTask
from fedqsn_cli.options import MergeOptions

STEM = "fedqsn-server-state"
FORMAT = "fedqsn-server-state/1"

Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class SavedState:
    """The state beside a model, and what its manifest says about it."""

    file: Checkpoint
    record: ServerStateRecord


def open_state(model: OpenModel, job: JobKey, optimizer: str) -> SavedState | None:
    """The state beside a model; None where it has none, and a new one begins.

    Raises:
        InputError: it is of another optimizer, job or model.
    """
    path = model.source.path / f"{STEM}.safetensors"
    if not os.path.lexists(path):  # a link to nothing is no new beginning
        return None
    record = model.manifest.server_state if model.manifest else None
    file = Checkpoint.open(path)
    facts = {"format": FORMAT, "job": job.commitment, "merged_into": record.merged_into if record else ""}
    if record is None or any(file.metadata.get(name) != value for name, value in facts.items()):
        hint = f"copy it together with its model, or take {path.name} out and begin anew"
        raise InputError("this state of a server optimizer belongs to another job or model", where=path, hint=hint)
    if record.optimizer != optimizer:
        hint = f"give --server-optimizer {record.optimizer}, or take {path.name} out and begin anew"
        raise InputError(f"the rounds before were merged with {record.optimizer}", where=path, hint=hint)
    return SavedState(file, record)


def state_specs(tasks: Sequence[TensorTask], optimizer: str) -> list[TensorSpec]:
    """The tensors of a state, in the order of the pass."""
    kinds = ("momentum",) if optimizer == "momentum" else ("momentum", "variance")
    floats = [task for task in tasks if task.tensor.is_float]
    return [TensorSpec(f"{kind}/{task.name}", "F32", task.plan.shape) for task in floats for kind in kinds]


class ServerOptimizer:
    """Turns the average of a round into the step that is taken, and writes the state that the next round begins with.

    Args:
        saved: where the last round ended.
        sink: takes the new state; see `state_sink`.
    """

    def __init__(self, options: MergeOptions, saved: SavedState | None, sink: TensorSink) -> None:
        self._options = options
        self._saved = saved
        self._sink = sink

    @property
    def adapts(self) -> bool:
        """Whether steps are divided by a running size of earlier ones."""
        return self._options.server_optimizer != "momentum"

    def advance(self, chunk: ModelChunk, delta: Doubles, seen: NDArray[np.bool_]) -> None:
        """Put the step of a chunk in the place of its average.

        Args:
            delta: Δ [rows, cols]. seen: which units move; broadcasts to the same shape.
        """
        options, tau = self._options, self._options.server_tau
        momentum = self._read("momentum", chunk, 0.0)
        old = momentum.copy()
        momentum = options.server_beta1 * momentum + (1 - options.server_beta1 if self.adapts else 1.0) * delta
        self._write("momentum", chunk, np.where(seen, momentum, old))
        if self.adapts:
            before = self._read("variance", chunk, tau**2)
            variance = self._variance(before, delta * delta)
            self._write("variance", chunk, np.where(seen, variance, before))
            momentum /= np.sqrt(variance) + tau
        delta[:] = momentum

    def _variance(self, variance: Doubles, squares: Doubles) -> Doubles:
        beta = self._options.server_beta2
        if self._options.server_optimizer == "adagrad":
            return variance + squares
        if self._options.server_optimizer == "adam":
            return beta * variance + (1 - beta) * squares
        change: Doubles = (1 - beta) * squares * np.sign(variance - squares)
        return variance - change

    def _read(self, kind: str, chunk: ModelChunk, start: float) -> Doubles:
        """Rows of the state; `start` where there is none yet. Raises FormatError: they are not numbers of a state."""
        values = np.full(chunk.values.shape, start, np.float32)
        if self._saved is not None:
            name = f"{kind}/{chunk.task.name}"
            self._saved.file.read_into(name, 4 * chunk.first * chunk.task.layout.view[2], values)
            if not np.isfinite(values).all() or (kind == "variance" and (values < 0).any()):
                raise FormatError("not the numbers of a state", where=f"{self._saved.file.path}: {name}")
        return values.astype(np.float64)

    def _write(self, kind: str, chunk: ModelChunk, values: Doubles) -> None:
        rows: NDArray[Any] = values.astype(np.float32)
        self._sink.write(f"{kind}/{chunk.task.name}", 4 * chunk.first * chunk.task.layout.view[2], rows)


def state_sink(
    writer: ArtifactWriter, tasks: Sequence[TensorTask], job: JobKey, optimizer: str, merged_into: str
) -> TensorSink:
    """A sink for the state beside a merged model.

    Args:
        merged_into: content digest of the model before; the manifest of the merged one has it, too.
    """
    metadata = {"format": FORMAT, "optimizer": optimizer, "job": job.commitment, "merged_into": merged_into}
    return writer.tensors(STEM, state_specs(tasks, optimizer), max_shard_bytes=None, metadata=metadata)


def require_tensors(saved: SavedState, tasks: Sequence[TensorTask]) -> None:
    """Refuse a state whose tensors are not those of the model. Raises FormatError."""
    wanted = {spec.name: (spec.dtype, spec.shape) for spec in state_specs(tasks, saved.record.optimizer)}
    found = {name: (entry.dtype, entry.shape) for name, entry in saved.file.entries.items()}
    if wanted != found:
        raise FormatError("its tensors are not those of the model", where=saved.file.path)
