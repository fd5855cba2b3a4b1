"""Models that can be put together from proxies and the public base; one is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedqsn_cli.auditing.inputs import Inputs, OwnerInputs
from fedqsn_cli.auditing.opened_proxy import OpenedProxy
from fedqsn_cli.auditing.recovery.evidence import Evidence, collect
from fedqsn_cli.auditing.rows import CHUNK, has_tensor, model_rows
from fedqsn_cli.masks.draw import rescale_factor
from fedqsn_cli.masks.job_masks import ServerMasks
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.models.dense import load_dense
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.models.public_base import PublicBase
from fedqsn_cli.models.tensor_task import TensorTask, tensor_tasks
from fedqsn_cli.quantization.layout import row_chunks

State = dict[str, Tensor]
Floats = NDArray[np.float32]

Estimate = Callable[[Evidence, Floats | None], Floats]
"""Values of rows, [rows, cols], from what is shown of them and, where there is one, from the public base."""


@dataclass(frozen=True)
class Assembly:
    """Builds models of the truth's architecture.

    Args:
        truth: gives architecture and dtypes; its weights are in no model but the server's.
    """

    inputs: Inputs
    truth: OpenModel

    @property
    def alone(self) -> bool:
        """Is there one proxy only?"""
        return len(self.inputs.proxies) == 1

    @property
    def has_base(self) -> bool:
        """Is there a public base?"""
        return self.inputs.base is not None

    @property
    def everything(self) -> tuple[OpenedProxy, ...]:
        """All proxies that an attacker holds, those of the last round first."""
        return tuple(sorted((*self.inputs.proxies, *self.inputs.earlier), key=lambda proxy: -proxy.manifest.round))

    def as_sent(self) -> State:
        """The first proxy."""
        return load_dense(self.inputs.proxies[0].checkpoint)

    def estimated(self, estimate: Estimate, proxies: Sequence[OpenedProxy] | None = None) -> State:
        """A model that is estimated row by row, from the audited proxies unless others are given."""
        state = load_dense(self.truth.checkpoint)
        for task in self._floats():
            values = self._empty(task)
            for first, count in self._runs(task):
                evidence = collect(proxies or self.inputs.proxies, task, first, count)
                values[first : first + count] = estimate(evidence, self._base_rows(task, first, count))
            state[task.name] = _as_stored(task, values)
        return state

    def scaled(self) -> State:
        """What is shown, scaled up for what is not."""
        state = load_dense(self.truth.checkpoint)
        for task in self._floats():
            values, shown = self._empty(task), 0
            for first, count in self._runs(task):
                evidence = collect(self.inputs.proxies, task, first, count)
                values[first : first + count] = evidence.first
                shown += int((evidence.count > 0).sum())
            if task.plan.masked:
                values *= np.float32(values.size / max(1, shown))
            state[task.name] = _as_stored(task, values)
        return state

    def holes(self) -> State:
        """1 where no proxy shows a weight, 0 elsewhere, and 0 in everything that is not masked."""
        state = load_dense(self.truth.checkpoint)
        for task in self._floats():
            values = np.zeros_like(self._empty(task))
            if task.plan.masked:
                for first, count in self._runs(task):
                    evidence = collect(self.everything, task, first, count)
                    values[first : first + count] = evidence.count == 0
            state[task.name] = _as_stored(task, values)
        return state

    def server(self, owner: OwnerInputs) -> State:
        """The server model: zero in its holes and the rest scaled by n / (n - hidden), or the public base in them."""
        masks, filled = ServerMasks(owner.job), self.inputs.proxies[0].manifest.fill == "base"
        base, state = self.inputs.base, load_dense(self.truth.checkpoint)
        for task in self._floats():
            tensor, hidden = task.plan, masks.hidden(task.plan)
            if hidden is None:
                continue
            values = state[tensor.name].float().numpy().copy()
            lead, rows, cols = tensor.view
            source = None
            if filled and base is not None and has_tensor(base, task):
                source = self._base_tensor(base, task).numpy().reshape(lead * rows, cols)
            _overwrite(hidden, values.reshape(lead * rows, cols), source, rows)
            if any(proxy.manifest.rescale for proxy in self.inputs.proxies):
                values *= rescale_factor(tensor.units, masks.count(tensor), 0)
            state[tensor.name] = torch.from_numpy(values)
        return state

    def working_base(self) -> PublicBase | None:
        """The public base, if it has all of the model: without a head it does not work."""
        base = self.inputs.base
        return base if base is not None and all(has_tensor(base, task) for task in self._floats()) else None

    def base(self, base: PublicBase) -> State:
        """The public base."""
        tensors = {task.name: self._base_tensor(base, task) for task in self._floats()}
        return load_dense(self.truth.checkpoint) | tensors

    def _base_tensor(self, base: PublicBase, task: TensorTask) -> Tensor:
        values = self._empty(task)
        for first, count in self._runs(task):
            values[first : first + count] = model_rows(base, task, first, count)
        return _as_stored(task, values)

    def _base_rows(self, task: TensorTask, first: int, count: int) -> Floats | None:
        base = self.inputs.base
        return model_rows(base, task, first, count) if base is not None and has_tensor(base, task) else None

    def _floats(self) -> list[TensorTask]:
        quantization = self.inputs.proxies[0].manifest.quantization
        tasks = tensor_tasks(self.truth, quantization, lambda tensor: None)
        return [task for task in tasks if task.tensor.is_float]

    def _empty(self, task: TensorTask) -> Floats:
        lead, rows, cols = task.layout.view
        return np.empty((lead * rows, cols), np.float32)

    def _runs(self, task: TensorTask) -> Iterator[tuple[int, int]]:
        quantization = self.inputs.proxies[0].manifest.quantization
        return row_chunks(task.layout, quantization.block_size if quantization else 1, CHUNK)


def _as_stored(task: TensorTask, values: Any) -> Tensor:
    """fp32 values of the working view [lead * rows, cols], as the tensor's own shape."""
    whole = values.T if task.layout.transposed else values
    return torch.from_numpy(np.ascontiguousarray(whole).reshape(task.tensor.shape))


def _overwrite(hidden: UnitMask, values: Any, source: Any, rows: int) -> None:
    """Zeros, or what `source` has there, on the hidden elements of a whole tensor [lead * rows, cols]."""
    step = rows if hidden.axis == "column" else len(values)  # columns are those of one lead slice
    for first in range(0, len(values), max(1, step)):
        part = slice(first, first + step)
        hidden.overwrite(values[part], first, None if source is None else source[part])
