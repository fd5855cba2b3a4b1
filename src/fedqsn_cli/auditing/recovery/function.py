"""Function recovery: how well a model works that is put together from what proxies show.

    ρ = (L_floor - L_attack) / (L_floor - L_global)

L are losses on the owner's evaluation data. The floor is what an attacker has without any proxy: the public base, or,
where that does not fit the task, a model that always answers with the data's averages. The curve trains the best
attacked model with public examples, in every way that the catalogue has; and the public base with the same examples,
which tells what the proxies add to them. Needs torch; holds two models at a time at most.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from fedqsn_cli.auditing.completeness import Collector
from fedqsn_cli.auditing.findings import Attempt, CurvePoint, FunctionRecovery, ModelScore
from fedqsn_cli.auditing.inputs import Inputs
from fedqsn_cli.auditing.recovery.attack_state import AttackState, Result
from fedqsn_cli.auditing.recovery.attackers.as_sent import AS_SENT
from fedqsn_cli.auditing.recovery.attackers.assembly import Assembly, State
from fedqsn_cli.auditing.recovery.attackers.attack import Start, Training, TrainingInputs
from fedqsn_cli.auditing.recovery.attackers.catalogue import STARTS, TRAININGS
from fedqsn_cli.auditing.recovery.attackers.evaluation import Evaluation, rho
from fedqsn_cli.errors import InputError
from fedqsn_cli.models.dense import load_dense
from fedqsn_cli.models.messages import quiet
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.models.torch_model import Loaded, load_model, memory_errors
from fedqsn_cli.training.data.data_files import open_data
from fedqsn_cli.training.steps.batching import Examples

SIZES = (8, 32, 128, 512, 2048, 8192)
"""Numbers of public examples on the curve, as far as there are so many."""


@dataclass(frozen=True, kw_only=True)
class FunctionOptions:
    """How function recovery is measured.

    Args:
        public_data: what an attacker may train with.
        public_examples: how many of them they have, one point of the curve each; None for sizes up to all.
        minutes: no training begins after so many; what was left out is reported. None: no limit.
        state: a file in which results are kept; see `attack_state`.
        base_losses: of the trained base, by number of examples, where they are known from an earlier audit.
    """

    public_data: str | Path | None = None
    public_examples: Sequence[int] | None = None
    minutes: float | None = None
    state: str | Path | None = None
    max_length: int = 256
    device: str = "auto"
    base_losses: Mapping[int, float] = field(default_factory=dict)


BY_DEFAULT = FunctionOptions()


def recover_function(
    inputs: Inputs, collector: Collector, eval_data: str | Path, options: FunctionOptions = BY_DEFAULT
) -> FunctionRecovery | None:
    """Measure global model, server model, proxy, attacked proxy and base, and train the attacked one.

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
            return FunctionAttack.on(inputs, truth, eval_data, options).measure(scope)

    return collector.attempt(measure, scope, problem="its function cannot be measured")


@dataclass
class FunctionAttack:
    """All attacks on one model's function, measured on the same examples.

    Args:
        whole: the global model as it was measured. state: the results until now.
        starts: those that can be tried here, by name.
        attempts: what was tried. left_out: what was not, since the time was over.
    """

    assembly: Assembly
    evaluation: Evaluation
    options: FunctionOptions
    whole: ModelScore
    state: AttackState
    starts: dict[str, Start] = field(init=False)
    attempts: list[Attempt] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    _begin: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        fitting = [start for start in STARTS if start.applies(self.assembly)]
        self.starts = {start.name(self.assembly): start for start in fitting}

    @classmethod
    def on(cls, inputs: Inputs, truth: OpenModel, eval_data: str | Path, options: FunctionOptions) -> FunctionAttack:
        """Open the data, and measure the global model."""
        loaded = load_model(truth.checkpoint, dense=load_dense(truth.checkpoint))
        evaluation = Evaluation.of(
            eval_data, loaded, max_length=options.max_length, device=options.device, progress=inputs.progress
        )
        settings = (options.public_examples, options.max_length, evaluation.device)
        state = AttackState.open(options.state, inputs, (eval_data, options.public_data), settings)
        return cls(Assembly(inputs, truth), evaluation, options, evaluation.score("global", loaded), state)

    def measure(self, scope: str) -> FunctionRecovery:
        """Everything, in the order of what it means."""
        assembly, owner = self.assembly, self.assembly.inputs.owner
        base = assembly.working_base()
        scores = [self.whole]
        if owner is not None:
            scores.append(self._built("server", lambda: assembly.server(owner)))
        results = {name: self._start(name) for name in self.starts}
        scores.append(results[AS_SENT.name(assembly)]._replace(model="proxy"))
        floor, floor_loss = "averages", math.nan
        if base is not None:
            scores.append(self._built("base", lambda: assembly.base(base)))
            floor, floor_loss = "base", scores[-1].loss
        best = min(results, key=lambda name: results[name].loss)
        scores.append(results[best])
        if base is None:
            floor_loss = self.evaluation.averages()
        curve = tuple(self.curve(best, floor_loss)) if self.options.public_data is not None else ()
        ratio = rho(floor_loss, results[best].loss, self.whole.loss)
        return FunctionRecovery(
            scope,
            tuple(scores),
            floor,
            floor_loss,
            ratio,
            best,
            curve,
            tuple(self.attempts),
            tuple(self.left_out),
        )

    def load(self, state: State) -> Loaded:
        """A model with these weights, on the device."""
        loaded = load_model(self.assembly.truth.checkpoint, dense=state)
        loaded.model.to(self.evaluation.device)
        return loaded

    def _built(self, name: str, build: Callable[[], State]) -> ModelScore:
        """Build a model and measure it."""

        def measure() -> Result:
            score = self.evaluation.score(name, self.load(build()))
            return Result(loss=score.loss, accuracy=score.accuracy, steps=0)

        found = self.state.result(name, measure)
        assert found is not None
        return ModelScore(name, found.loss, found.accuracy)

    def _start(self, name: str) -> ModelScore:
        """Weights that need no example."""
        start = self.starts[name]
        score = self._built(name, lambda: start.build(self.assembly))._replace(model="attacked")
        self.attempts.append(Attempt(name, start.source, 0, score.loss, score.accuracy, 0))
        return score

    def curve(self, attack: str, floor_loss: float) -> Iterator[CurvePoint]:
        """The attacked model after training with so many public examples, a point each.

        Args:
            attack: the weights that it starts from. Those that fill holes with the base are tried too: a model that
                gives nearly the same answer to everything may have the least loss, and learn nothing.
        """
        sizes = SIZES if self.options.public_examples is None else self.options.public_examples
        public = self.public()
        for count in _counts(len(public), sizes):
            part = _first(public, count)
            best = self._trained(attack, part)
            if best is None:
                continue
            base_loss = self._base_loss(part)
            gain = rho(base_loss, best.loss, self.whole.loss) if base_loss is not None else None
            least = best.loss if base_loss is None else min(best.loss, base_loss)  # they may leave the proxies alone
            reached = rho(floor_loss, least, self.whole.loss)
            yield CurvePoint(count, best.loss, best.accuracy, reached, base_loss, gain, best.attack)

    def public(self) -> Examples:
        """The attacker's examples. Raises InputError, DataError."""
        if self.options.public_data is None:
            raise InputError("the attacker has no examples", where="--public-data")
        return self.evaluation.encoder.encode(open_data(self.options.public_data), self.evaluation.progress)

    def training_inputs(self, build: Callable[[], Loaded], examples: Examples) -> TrainingInputs:
        """What a training may use."""
        padding, progress = self.evaluation.encoder.padding, self.evaluation.progress
        return TrainingInputs(
            build, examples, padding, self.holes, lambda: self.load(self.assembly.as_sent()), progress
        )

    def _trained(self, attack: str, examples: Examples) -> Attempt | None:
        """The best that training with examples makes of the proxies; None where the time was over before."""
        first, *others = TRAININGS
        filled = next((name for name, start in self.starts.items() if start.filled), attack)
        starts = (attack,) if self.starts[attack].filled else dict.fromkeys((attack, filled))
        tried = [self._tried(first, name, examples) for name in starts]
        done = [attempt for attempt in tried if attempt is not None]
        if not done:
            return None
        start = min(done, key=lambda attempt: attempt.loss).attack.removesuffix(f", {first.name}")
        done += [attempt for training in others if (attempt := self._tried(training, start, examples)) is not None]
        return min(done, key=lambda attempt: attempt.loss)

    def _tried(self, training: Training, start: str, examples: Examples) -> Attempt | None:
        """One way of training one start; None where it does not apply, or where the time is over."""
        build = self.starts[start].build
        name = f"{start}, {training.name}"
        attempt = self._best_rate(name, training, examples, lambda: self.load(build(self.assembly)))
        if attempt is not None:
            self.attempts.append(attempt)
        return attempt

    def _best_rate(
        self, name: str, training: Training, examples: Examples, build: Callable[[], Loaded]
    ) -> Attempt | None:
        """A training at the rate that serves the attacker best; None where it does not apply, or the time is over."""
        label = f"{name}, {len(examples)} examples"
        if label not in self.state.results and self._is_over():
            self.left_out.append(label)
            return None
        best = self.state.result(label, lambda: self._trained_at_best(training, examples, build))
        if best is None:
            return None
        return Attempt(name, training.source, len(examples), best.loss, best.accuracy, best.steps)

    def _trained_at_best(self, training: Training, examples: Examples, build: Callable[[], Loaded]) -> Result | None:
        """Train at every rate; None where the training has nothing to train."""
        given, results = self.training_inputs(build, examples), []
        for rate in training.rates:
            trained = training.run(given, rate)
            if trained is None:
                return None
            score = self.evaluation.score("attacked", trained.loaded)
            results.append((score, trained.steps))
        best = min((score for score, _ in results), key=lambda score: score.loss)
        return Result(loss=best.loss, accuracy=best.accuracy, steps=sum(steps for _, steps in results))

    def holes(self) -> dict[str, Tensor]:
        """True where no proxy shows a weight, by the model's own names; parameters without holes are left out."""
        marked = self.load(self.assembly.holes()).model
        masks = {name: parameter.detach() > 0.5 for name, parameter in marked.named_parameters()}
        return {name: mask for name, mask in masks.items() if bool(mask.any())}

    def _base_loss(self, examples: Examples) -> float | None:
        """Loss of the public base after the same trainings, at its best."""
        count, base = len(examples), self.assembly.working_base()
        if count in self.options.base_losses:
            return self.options.base_losses[count]
        if base is None:
            return None
        found = [
            self._best_rate(f"base, {training.name}", training, examples, lambda: self.load(self.assembly.base(base)))
            for training in TRAININGS
            if training.of_base
        ]
        return min((attempt.loss for attempt in found if attempt is not None), default=None)

    def _is_over(self) -> bool:
        minutes = self.options.minutes
        return minutes is not None and time.monotonic() - self._begin > 60 * minutes


def _first(examples: Examples, count: int) -> Examples:
    return replace(examples, features=examples.features[:count], targets=examples.targets[:count])


def _counts(available: int, sizes: Sequence[int]) -> Sequence[int]:
    """Numbers of examples on the curve: those that there are enough for, and all if there are not enough for more."""
    counts = sorted({size for size in sizes if 0 < size <= available})
    return counts if sizes and max(sizes) <= available else [*counts, available] if available not in counts else counts
