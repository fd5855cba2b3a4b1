"""Every weight is trained, as whoever wants the model and not federated learning would do."""

from __future__ import annotations

from fedqsn_cli.auditing.recovery.attackers.attack import Trained, Training, TrainingInputs
from fedqsn_cli.models.torch_model import Loaded
from fedqsn_cli.training.compact import Trainable, VisibleParameters
from fedqsn_cli.training.loop import train


def fitted(given: TrainingInputs, loaded: Loaded, rate: float, trainable: Trainable | None = None) -> Trained:
    """Train a model: every weight, unless told otherwise."""
    part = VisibleParameters(loaded.model, {}) if trainable is None else trainable
    summary = train(loaded.model, given.examples, part, given.recipe(rate), given.padding, given.progress)
    return Trained(loaded, summary.steps)


FULL = Training(
    name="fine-tuning",
    source="plain fine-tuning",
    rates=(1e-4, 3e-4, 1e-3),
    run=lambda given, rate: fitted(given, given.build(), rate),
)
