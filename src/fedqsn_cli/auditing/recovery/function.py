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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedqsn_cli.auditing.completeness import Collector
from fedqsn_cli.auditing.findings import CurvePoint, FunctionRecovery, ModelScore
from fedqsn_cli.auditing.inputs import Inputs, OwnerInputs
from fedqsn_cli.auditing.recovery.evidence import collect
from fedqsn_cli.auditing.rows import CHUNK, has_tensor, model_rows
from fedqsn_cli.masks.draw import rescale_factor
from fedqsn_cli.masks.job_masks import ServerMasks
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.models.dense import load_dense
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.models.public_base import PublicBase
from fedqsn_cli.models.tensor_task import TensorTask, tensor_tasks
from fedqsn_cli.models.torch_model import Loaded, choose_device, load_model, memory_errors, quiet
from fedqsn_cli.options import RecipeOptions
from fedqsn_cli.progress import Progress
from fedqsn_cli.quantization.layout import row_chunks
from fedqsn_cli.training.batching import Examples
from fedqsn_cli.training.compact import VisibleParameters
from fedqsn_cli.training.data import Encoder
from fedqsn_cli.training.loop import train
from fedqsn_cli.training.scoring import score as score_model
from fedqsn_cli.training.tables import read_table
from fedqsn_cli.training.tasks import TASKS

State = dict[str, Tensor]
Build = Callable[[], State]

STEPS = (8, 32, 128, 512, 2048, 8192)
"""Numbers of public examples on the curve, as far as there are so many."""

_RATES = (1e-4, 3e-4, 1e-3)
"""Learning rates that the attacker tries; the one that serves them best counts."""

_BATCH, _LEAST_STEPS, _MOST_STEPS = 16, 40, 600


@dataclass(frozen=True, kw_only=True)
class FunctionOptions:
    """How function recovery is measured.

    Args:
        public_data: what an attacker may fine-tune with.
        public_examples: how many of them they have, one point of the curve each; None for steps up to all.
        base_losses: of the fine-tuned base, by number of examples, where they are known from an earlier audit.
    """

    public_data: str | Path | None = None
    public_examples: Sequence[int] | None = None
    max_length: int = 256
    device: str = "auto"
    base_losses: Mapping[int, float] = field(default_factory=dict)


BY_DEFAULT = FunctionOptions()


def recover_function(
    inputs: Inputs, collector: Collector, eval_data: str | Path, options: FunctionOptions = BY_DEFAULT
) -> FunctionRecovery | None:
    """Measure global model, server model, proxy, attacked proxy and base, and fine-tune the attacked one.

    Args:
        eval_data: the owner's labelled data.

    Returns:
        None, with an FQ903 finding, where a model cannot be built or measured.
    """
    truth = inputs.truth
    if truth is None or not inputs.proxies:
        return None
    scope = inputs.proxies[0].scope if len(inputs.proxies) == 1 else f"coalition of {len(inputs.proxies)}"

    def measure() -> FunctionRecovery:
        with quiet(), memory_errors():
            return FunctionAttack.on(inputs, truth, eval_data, options).measure(scope, options)

    return collector.attempt(measure, scope, problem="its function cannot be measured")


@dataclass(frozen=True)
class Evaluation:
    """The owner's examples, and where models are measured on them."""

    encoder: Encoder
    examples: Examples
    device: torch.device
    progress: Progress

    def score(self, name: str, loaded: Loaded) -> ModelScore:
        """Loss and accuracy of a model."""
        model, padding = loaded.model.to(self.device), self.encoder.padding
        result = score_model(model, self.examples, batch_size=32, padding=padding, progress=self.progress)
        return ModelScore(name, result.loss, result.accuracy)


@dataclass
class FunctionAttack:
    """Builds models of one architecture and measures them on the same examples.

    Args:
        whole: the global model as it was measured. base_losses: of the fine-tuned base, by number of examples.
        attacks: models that an attacker can put together, by name; the best of them counts.
    """

    inputs: Inputs
    truth: OpenModel
    evaluation: Evaluation
    whole: ModelScore
    base_losses: dict[int, float]
    attacks: dict[str, Build] = field(init=False)

    def __post_init__(self) -> None:
        self.attacks = dict(self._attacks())

    @classmethod
    def on(cls, inputs: Inputs, truth: OpenModel, eval_data: str | Path, options: FunctionOptions) -> FunctionAttack:
        """Open the data, and measure the global model."""
        device, table = choose_device(options.device), read_table(eval_data)
        loaded = load_model(truth.checkpoint, dense=load_dense(truth.checkpoint))
        encoder = Encoder.of(loaded, options.max_length)
        examples = encoder.encode(table, inputs.progress)
        evaluation = Evaluation(encoder, examples, device, inputs.progress)
        return cls(inputs, truth, evaluation, evaluation.score("global", loaded), dict(options.base_losses))

    def measure(self, scope: str, options: FunctionOptions = BY_DEFAULT) -> FunctionRecovery:
        """Everything, in the order of what it means."""
        base, owner = self._working_base(), self.inputs.owner
        scores = [self.whole]
        if owner is not None:
            scores.append(self._built("server", self._server(owner)))
        scores.append(self._built("proxy", load_dense(self.inputs.proxies[0].checkpoint)))
        floor, floor_loss = "averages", math.nan
        if base is not None:
            scores.append(self._built("base", self._base(base)))
            floor, floor_loss = "base", scores[-1].loss
        results = {name: self._built("attacked", build()) for name, build in self.attacks.items()}
        best = min(results, key=lambda name: results[name].loss)
        scores.append(results[best])
        if base is None:
            floor_loss = self._averages()
        curve: tuple[CurvePoint, ...] = ()
        if options.public_data is not None:
            sizes = STEPS if options.public_examples is None else options.public_examples
            curve = tuple(self.curve(best, options.public_data, sizes, floor_loss))
        ratio = rho(floor_loss, results[best].loss, self.whole.loss)
        return FunctionRecovery(scope, tuple(scores), floor, floor_loss, ratio, best, curve)

    def _built(self, name: str, state: State) -> ModelScore:
        """Build a model and measure it."""
        return self.evaluation.score(name, load_model(self.truth.checkpoint, dense=state))

    def _server(self, owner: OwnerInputs) -> State:
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

    def _working_base(self) -> PublicBase | None:
        """The public base, if it has all of the model: without a head it does not work."""
        base = self.inputs.base
        return base if base is not None and all(has_tensor(base, task) for task in self._floats()) else None

    def _base(self, base: PublicBase) -> State:
        """The public base, built anew each time: training moves the tensors themselves."""
        tensors = {task.name: self._base_tensor(base, task) for task in self._floats()}
        return load_dense(self.truth.checkpoint) | tensors

    def _base_tensor(self, base: PublicBase, task: TensorTask) -> Tensor:
        """A tensor of the public base."""
        lead, rows, cols = task.layout.view
        values = np.empty((lead * rows, cols), np.float32)
        for first, count in self._runs(task):
            values[first : first + count] = model_rows(base, task, first, count)
        return _as_stored(task, values)

    def _floats(self) -> list[TensorTask]:
        quantization = self.inputs.proxies[0].manifest.quantization
        tasks = tensor_tasks(self.truth, quantization, lambda tensor: None)
        return [task for task in tasks if task.tensor.is_float]

    def _runs(self, task: TensorTask) -> Iterator[tuple[int, int]]:
        quantization = self.inputs.proxies[0].manifest.quantization
        return row_chunks(task.layout, quantization.block_size if quantization else 1, CHUNK)

    def _attacks(self) -> Iterator[tuple[str, Build]]:
        """What an attacker can put together, and how."""
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
                evidence, base = collect(self.inputs.proxies, task, first, count), self.inputs.base
                seen, part = evidence.count > 0, evidence.first
                if fill == "base" and base is not None and has_tensor(base, task):
                    part = np.where(seen, part, model_rows(base, task, first, count))
                values[first : first + count] = part
                shown += int(seen.sum())
            if fill == "scaled" and task.plan.masked:
                values *= np.float32(values.size / max(1, shown))
            state[task.name] = _as_stored(task, values)
        return state

    def _averages(self) -> float:
        """Loss of a model that answers with how often each label, or each token, is right."""
        examples = self.evaluation.examples
        return TASKS[examples.task].constant_loss(examples.targets)

    def curve(
        self, attack: str, public_data: str | Path, sizes: Sequence[int], floor_loss: float
    ) -> Iterator[CurvePoint]:
        """An attacked model after fine-tuning with so many public examples, a point each.

        Args:
            attack: which one. Those that fill holes with the base are tried too: a model that gives nearly the same
                answer to everything may have the least loss, and learn nothing.
        """
        starts = [attack, *(name for name in self.attacks if name.endswith("base fill") and name != attack)]
        public = self.evaluation.encoder.encode(read_table(public_data), self.inputs.progress)
        for count in _counts(len(public), sizes):
            part = Examples(public.task, public.features[:count], public.targets[:count])
            tuned = min((self._tuned(self.attacks[name], part) for name in starts), key=lambda result: result.loss)
            start = self._base_loss(part)
            gain = rho(start, tuned.loss, self.whole.loss) if start is not None else None
            least = tuned.loss if start is None else min(tuned.loss, start)  # they may leave the proxies alone
            yield CurvePoint(count, tuned.loss, tuned.accuracy, rho(floor_loss, least, self.whole.loss), start, gain)

    def _tuned(self, build: Build, examples: Examples) -> ModelScore:
        """A model after fine-tuning with examples, at the rate that serves it best."""
        steps = math.ceil(len(examples) / _BATCH)
        epochs = max(3, math.ceil(_LEAST_STEPS / steps))
        results = []
        for rate in _RATES:
            loaded = load_model(self.truth.checkpoint, dense=build())
            loaded.model.to(self.evaluation.device)
            recipe = RecipeOptions(epochs=epochs, max_steps=_MOST_STEPS, lr=rate, batch_size=_BATCH, precision="fp32")
            train(
                loaded.model,
                examples,
                VisibleParameters(loaded.model, {}),
                recipe,
                self.evaluation.encoder.padding,
                self.inputs.progress,
            )
            results.append(self.evaluation.score("attacked", loaded))
        return min(results, key=lambda result: result.loss)

    def _base_loss(self, examples: Examples) -> float | None:
        """Loss of the public base after the same fine-tuning."""
        count, base = len(examples), self._working_base()
        if count not in self.base_losses:
            if base is None:
                return None
            self.base_losses[count] = self._tuned(lambda: self._base(base), examples).loss
        return self.base_losses[count]


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


def _counts(available: int, sizes: Sequence[int]) -> Sequence[int]:
    """Numbers of examples on the curve: those that there are enough for, and all if there are not enough for more."""
    counts = sorted({size for size in sizes if 0 < size <= available})
    return counts if sizes and max(sizes) <= available else [*counts, available] if available not in counts else counts


def rho(floor: float, attack: float, whole: float) -> float | None:
    """(L_floor - L_attack) / (L_floor - L_global); None where the global model is no better than the floor."""
    return (floor - attack) / (floor - whole) if floor > whole else None
