"""Every weight is trained, as whoever wants the model and not federated learning would do."""

from __future__ import annotations

from fedqsn_cli.auditing.recovery.attackers.attack import Lab, Trained, Training
from fedqsn_cli.models.torch_model import Loaded
from fedqsn_cli.training.compact import VisibleParameters
from fedqsn_cli.training.loop import train


def fitted(lab: Lab, loaded: Loaded, rate: float) -> Trained:
    """Train every weight of a model."""
    trainable = VisibleParameters(loaded.model, {})
    summary = train(loaded.model, lab.examples, trainable, lab.recipe(rate), lab.padding, lab.progress)
    return Trained(loaded, summary.steps)


FULL = Training(
    name="fine-tuning",
    source="plain fine-tuning",
    rates=(1e-4, 3e-4, 1e-3),
    run=lambda lab, rate: fitted(lab, lab.build(), rate),
)
