"""Models that can be put together from proxies and the public base; one is in memory at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
        known = self.inputs.proxies if proxies is None else proxies
        return self._made(
            lambda task, first, count: estimate(collect(known, task, first, count), self._base_rows(task, first, count))
        )

    def scaled(self) -> State:
        """What is shown, scaled up for what is not."""
        shown: Counter[str] = Counter()

        def rows(task: TensorTask, first: int, count: int) -> Floats:
            evidence = collect(self.inputs.proxies, task, first, count)
            shown[task.name] += int(np.count_nonzero(evidence.count))
            return evidence.first

        state = self._made(rows)
        for task in self._floats():
            state[task.name] *= task.size / max(1, shown[task.name])
        return state

    def holes(self) -> State:
        """1 where no proxy shows a weight, 0 elsewhere."""
        return self.estimated(lambda evidence, base: np.asarray(evidence.count == 0, np.float32), self.everything)

    def server(self, owner: OwnerInputs) -> State:
        """The server model: zero in its holes and the rest scaled by n / (n - hidden), or the public base in them."""
        masks, filled = ServerMasks(owner.job), self.inputs.proxies[0].manifest.fill == "base"
        rescaled = any(proxy.manifest.rescale for proxy in self.inputs.proxies)

        def rows(task: TensorTask, first: int, count: int) -> Floats:
            x, hidden = model_rows(self.truth, task, first, count), masks.hidden(task.plan)
            if hidden is None:
                return x
            task.layout.working(hidden).overwrite(x, first, self._base_rows(task, first, count) if filled else None)
            return x * rescale_factor(task.plan.units, masks.count(task.plan), 0) if rescaled else x

        return self._made(rows)

    def working_base(self) -> PublicBase | None:
        """The public base, if it has all of the model: without a head it does not work."""
        base = self.inputs.base
        return base if base is not None and all(has_tensor(base, task) for task in self._floats()) else None

    def base(self, base: PublicBase) -> State:
        """The public base."""
        return self._made(lambda task, first, count: model_rows(base, task, first, count))

    def _made(self, rows: Callable[[TensorTask, int, int], Floats]) -> State:
        """A model whose floats are made by runs of rows, given a tensor, the first row and their number."""
        state = load_dense(self.truth.checkpoint)
        for task in self._floats():
            lead, height, cols = task.layout.view
            values = np.empty((lead * height, cols), np.float32)
            for first, count in row_chunks(task.layout, self._block, CHUNK):
                values[first : first + count] = rows(task, first, count)
            whole = values.T if task.layout.transposed else values
            state[task.name] = torch.from_numpy(np.ascontiguousarray(whole).reshape(task.tensor.shape))
        return state

    def _base_rows(self, task: TensorTask, first: int, count: int) -> Floats | None:
        base = self.inputs.base
        return model_rows(base, task, first, count) if base is not None and has_tensor(base, task) else None

    def _floats(self) -> list[TensorTask]:
        tasks = tensor_tasks(self.truth, self.inputs.proxies[0].manifest.quantization, lambda tensor: None)
        return [task for task in tasks if task.tensor.is_float]

    @property
    def _block(self) -> int:
        quantization = self.inputs.proxies[0].manifest.quantization
        return quantization.block_size if quantization is not None else 1
