"""Function recovery: how well a model works that is put together from what proxies show.

    ρ = (L_floor - L_attack) / (L_floor - L_global)

L are losses on the owner's evaluation data. The floor is what an attacker has without any proxy: the public base, or,
where that does not fit the task, a model that always answers with the data's averages. The curve fine-tunes the best
attacked model with public examples, every weight of it, as an attacker would who wants the model and not federated
learning; and the public base with the same examples, which tells what the proxies add to them. Needs torch; holds one
model at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedqsn_cli.auditing.findings import CurvePoint, FunctionRecovery, ModelScore
from fedqsn_cli.auditing.inputs import Inputs, OpenedProxy, Report
from fedqsn_cli.auditing.recovery.attacks import Evidence
from fedqsn_cli.auditing.recovery.intervals import read_values
from fedqsn_cli.auditing.rows import CHUNK, has_tensor, model_rows, shown_flags
from fedqsn_cli.auditing.rules import finding
from fedqsn_cli.errors import FedqsnError
from fedqsn_cli.masks.draw import rescale_factor
from fedqsn_cli.masks.job_masks import ServerMasks
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.models.dense import load_dense
from fedqsn_cli.models.tensor_task import TensorTask, tensor_tasks
from fedqsn_cli.models.torch_model import Loaded, choose_device, load_model, memory_errors, quiet
from fedqsn_cli.options import RecipeOptions
from fedqsn_cli.progress import Progress, Silent
from fedqsn_cli.quantization.layout import row_chunks
from fedqsn_cli.training.batching import Examples
from fedqsn_cli.training.data import Encoder
from fedqsn_cli.training.loop import train
from fedqsn_cli.training.scoring import score
from fedqsn_cli.training.tables import read_table

State = dict[str, Tensor]

STEPS = (8, 32, 128, 512, 2048, 8192)
"""Numbers of public examples on the curve, as far as there are so many."""

_RATES = (1e-4, 3e-4, 1e-3)
"""Learning rates that the attacker tries; the one that serves him best counts."""

_BATCH, _LEAST_STEPS, _MOST_STEPS = 16, 40, 600


def recover_function(
    inputs: Inputs,
    report: Report,
    eval_data: str | Path,
    public_data: str | Path | None = None,
    public_examples: Sequence[int] | None = None,
    progress: Progress | None = None,
    *,
    max_length: int = 256,
    device: str = "auto",
    base_losses: Mapping[int, float] | None = None,
) -> FunctionRecovery | None:
    """Measure global model, server model, proxy, attacked proxy and base, and fine-tune the attacked one.

    Args:
        eval_data: the owner's labelled data. public_data: what an attacker may fine-tune with.
        public_examples: how many of them he has, one point of the curve each; None for steps up to all.
        base_losses: of the fine-tuned base, by number of examples, where they are known from an earlier audit.

    Returns:
        None, with an FQ903 finding, where a model cannot be built or measured.
    """
    if inputs.truth is None or not inputs.proxies:
        return None
    scope = inputs.proxies[0].scope if len(inputs.proxies) == 1 else f"coalition of {len(inputs.proxies)}"
    try:
        with quiet(), memory_errors():
            bench = _Bench(inputs, eval_data, max_length, device, progress or Silent(), dict(base_losses or {}))
            return bench.measure(scope, public_data, public_examples)
    except FedqsnError as error:
        report.findings.append(finding("FQ903", scope, f"its function cannot be measured: {error.what}"))
        return None


class _Bench:
    """Builds models of one architecture and measures them on the same examples."""

    def __init__(
        self,
        inputs: Inputs,
        data: str | Path,
        max_length: int,
        device: str,
        progress: Progress,
        base_losses: dict[int, float],
    ) -> None:
        assert inputs.truth is not None
        self._base_losses = base_losses
        self.inputs, self.truth, self.progress = inputs, inputs.truth, progress
        self.device, self.max_length = choose_device(device), max_length
        self._table = read_table(data)
        self._encoder: Encoder | None = None
        self._examples: Examples | None = None

    def measure(self, scope: str, public_data: str | Path | None, sizes: Sequence[int] | None) -> FunctionRecovery:
        """Everything, in the order of what it means."""
        scores = [self.named("global", load_dense(self.truth.checkpoint))]
        if self.inputs.job is not None:
            scores.append(self.named("server", self._server()))
        scores.append(self.named("proxy", load_dense(self.inputs.proxies[0].checkpoint)))
        base = self._base()
        if base is not None:
            scores.append(self.named("base", base))
        best, attacked = min(
            ((name, self.named("attacked", build())) for name, build in self._attacks()), key=lambda pair: pair[1].loss
        )
        scores.append(attacked)
        floor, floor_loss = ("base", scores[-2].loss) if base is not None else ("averages", self._averages())
        whole = scores[0].loss
        curve: tuple[CurvePoint, ...] = ()
        if public_data is not None:
            curve = tuple(self._curve(best, public_data, sizes, floor_loss, whole))
        ratio = rho(floor_loss, attacked.loss, whole)
        return FunctionRecovery(scope, tuple(scores), floor, floor_loss, ratio, best, curve)

    def named(self, name: str, state: State) -> ModelScore:
        """Build a model and measure it."""
        return self._score(name, self._load(state))

    def _load(self, state: State) -> Loaded:
        return load_model(self.truth.checkpoint, dense=state)

    def _score(self, name: str, loaded: Loaded) -> ModelScore:
        if self._encoder is None or self._examples is None:
            self._encoder = Encoder.of(loaded, self.max_length)
            self._examples = self._encoder.encode(self._table, self.progress)
        model = loaded.model.to(self.device)
        padding = self._encoder.padding
        result = score(model, self._examples, batch_size=32, padding=padding, progress=self.progress)
        return ModelScore(name, result.loss, result.accuracy)

    def _server(self) -> State:
        """The server model: zero in its holes and the rest scaled by n / (n - hidden), or the public base in them."""
        assert self.inputs.job is not None
        masks, filled = ServerMasks(self.inputs.job), self.inputs.proxies[0].manifest.fill == "base"
        state = load_dense(self.truth.checkpoint)
        for task in self._floats():
            tensor = task.plan
            hidden = masks.hidden(tensor)
            if hidden is None:
                continue
            values = state[tensor.name].float().numpy().copy()
            lead, rows, cols = tensor.view
            source = None
            if filled and self.inputs.base is not None and has_tensor(self.inputs.base, task):
                source = self._base_tensor(task).numpy().reshape(lead * rows, cols)
            _overwrite(hidden, values.reshape(lead * rows, cols), source, rows)
            factor = rescale_factor(tensor.units, masks.count(tensor), 0)
            if any(proxy.manifest.rescale for proxy in self.inputs.proxies):
                values *= factor
            state[tensor.name] = torch.from_numpy(values)
        return state

    def _base(self) -> State | None:
        """The public base, if it has all of the model: without a head it does not work."""
        if not self._base_works():
            return None
        state = load_dense(self.truth.checkpoint)
        for task in self._floats():
            state[task.name] = self._base_tensor(task)
        return state

    def _base_tensor(self, task: TensorTask) -> Tensor:
        """A tensor of the public base."""
        assert self.inputs.base is not None
        lead, rows, cols = task.layout.view
        values = np.empty((lead * rows, cols), np.float32)
        for first, count in self._runs(task):
            values[first : first + count] = model_rows(self.inputs.base, task, first, count)
        return _stored(task, values)

    def _base_works(self) -> bool:
        """Is there a public base that has all of the model?"""
        base = self.inputs.base
        return base is not None and all(has_tensor(base, task) for task in self._floats())

    def _todo(self) -> list[TensorTask]:
        return tensor_tasks(self.truth, self.inputs.proxies[0].manifest.quantization, lambda tensor: None)

    def _floats(self) -> list[TensorTask]:
        return [task for task in self._todo() if task.tensor.is_float]

    def _runs(self, task: TensorTask) -> Iterator[tuple[int, int]]:
        how = self.inputs.proxies[0].manifest.quantization
        return row_chunks(task.layout, how.block_size if how else 1, CHUNK)

    def _attacks(self) -> Iterator[tuple[str, Callable[[], State]]]:
        """Models that an attacker can put together; the best of them counts."""
        alone = len(self.inputs.proxies) == 1
        yield "as sent", lambda: load_dense(self.inputs.proxies[0].checkpoint)
        yield "descale" if alone else "union", lambda: self._put_together("zero")
        if not alone:
            yield "union, scaled by what is shown", lambda: self._put_together("scaled")
        if self.inputs.base is not None:
            yield "descale, base fill" if alone else "union, base fill", lambda: self._put_together("base")

    def _put_together(self, fill: str) -> State:
        """Descaled values of the first proxy that shows them; `fill` in the holes, or scaled by what is shown."""
        state = load_dense(self.truth.checkpoint)
        for task in self._floats():
            lead, rows, cols = task.layout.view
            values = np.empty((lead * rows, cols), np.float32)
            shown = 0
            for first, count in self._runs(task):
                part, seen = self._rows(task, first, count, fill)
                values[first : first + count] = part
                shown += seen
            if fill == "scaled" and task.plan.masked:
                values *= np.float32(values.size / max(1, shown))
            state[task.name] = _stored(task, values)
        return state

    def _rows(self, task: TensorTask, first: int, count: int, fill: str) -> tuple[Any, int]:
        evidence = Evidence.none((count, task.layout.view[2]))
        for proxy in self.inputs.proxies:
            _add(evidence, proxy, task, first, count)
        seen = evidence.count > 0
        if fill == "base" and has_tensor(self.inputs.base, task):
            assert self.inputs.base is not None
            return np.where(seen, evidence.first, model_rows(self.inputs.base, task, first, count)), int(seen.sum())
        return evidence.first, int(seen.sum())

    def _averages(self) -> float:
        """Loss of a model that answers with how often each label, or each token, is right."""
        assert self._examples is not None
        targets: list[int] = []
        for target in self._examples.targets:
            targets += [target] if isinstance(target, int) else [token for token in target[1:] if token >= 0]
        counts = Counter(targets)
        return -sum(count * math.log(count / len(targets)) for count in counts.values()) / len(targets)

    def _curve(
        self, attack: str, public_data: str | Path, sizes: Sequence[int] | None, floor: float, whole: float
    ) -> Iterator[CurvePoint]:
        builds = dict(self._attacks())
        # Not only the one that starts best: a model that gives nearly the same answer to everything may have the least
        # loss, and learn nothing.
        starts = [attack, *(name for name in builds if name.endswith("base fill") and name != attack)]
        assert self._encoder is not None
        public = self._encoder.encode(read_table(public_data), self.progress)
        for count in _counts(len(public), STEPS if sizes is None else sizes):
            part = Examples(public.task, public.features[:count], public.targets[:count])
            tuned = min((self._tuned(builds[name], part) for name in starts), key=lambda result: result.loss)
            start = self._base_loss(part)
            gain = rho(start, tuned.loss, whole) if start is not None else None
            least = tuned.loss if start is None else min(tuned.loss, start)  # he may leave the proxies alone
            yield CurvePoint(count, tuned.loss, tuned.accuracy, rho(floor, least, whole), start, gain)

    def _tuned(self, build: Callable[[], State], examples: Examples) -> ModelScore:
        """A model after fine-tuning with examples, at the rate that serves it best."""
        assert self._encoder is not None
        steps = math.ceil(len(examples) / _BATCH)
        epochs = max(3, math.ceil(_LEAST_STEPS / steps))
        results = []
        for rate in _RATES:
            loaded = self._load(build())
            loaded.model.to(self.device)
            recipe = RecipeOptions(epochs=epochs, max_steps=_MOST_STEPS, lr=rate, batch_size=_BATCH, precision="fp32")
            train(loaded.model, examples, {}, recipe, self._encoder.padding, self.progress)
            results.append(self._score("attacked", loaded))
        return min(results, key=lambda result: result.loss)

    def _base_loss(self, examples: Examples) -> float | None:
        """Loss of the public base after the same fine-tuning."""
        count = len(examples)
        if count not in self._base_losses:
            if not self._base_works():
                return None
            # made anew each time: training moves the tensors themselves
            self._base_losses[count] = self._tuned(lambda: self._base() or {}, examples).loss
        return self._base_losses[count]


def _stored(task: TensorTask, values: Any) -> Tensor:
    """fp32 values of the working view [lead * rows, cols], as the tensor's own shape."""
    whole = values.T if task.layout.transposed else values
    return torch.from_numpy(np.ascontiguousarray(whole).reshape(task.tensor.shape))


def _overwrite(hidden: UnitMask, values: Any, source: Any, rows: int) -> None:
    """Zeros, or what `source` has there, on the hidden elements of a whole tensor [lead * rows, cols]."""
    step = rows if hidden.axis == "column" else len(values)  # columns are those of one lead slice
    for first in range(0, len(values), max(1, step)):
        part = slice(first, first + step)
        hidden.overwrite(values[part], first, None if source is None else source[part])


def _add(evidence: Evidence, proxy: OpenedProxy, task: TensorTask, first: int, count: int) -> None:
    """One proxy's rows."""
    sent = read_values(proxy, task, first, count)
    row_flags, flags = shown_flags(proxy, task, first, count)
    values = sent / proxy.factor(task.name)
    evidence.add(values, values, values, row_flags[:, None] & (flags > 0), values)


def _counts(available: int, sizes: Sequence[int]) -> Sequence[int]:
    """Numbers of examples on the curve: those that there are enough for, and all if there are not enough for more."""
    counts = sorted({size for size in sizes if 0 < size <= available})
    return counts if sizes and max(sizes) <= available else [*counts, available] if available not in counts else counts


def rho(floor: float, attack: float, whole: float) -> float | None:
    """(L_floor - L_attack) / (L_floor - L_global); None where the global model is no better than the floor."""
    return (floor - attack) / (floor - whole) if floor > whole else None
