"""Low-rank adapters on every linear layer: few examples teach fewer numbers faster."""

from __future__ import annotations

from typing import Any

from fedqsn_cli.auditing.recovery.attackers.attack import Trained, Training, TrainingInputs
from fedqsn_cli.auditing.recovery.attackers.full import fitted
from fedqsn_cli.models.architecture import CLASSIFIERS
from fedqsn_cli.training.compact import TrainedPart, VisibleParameters
from fedqsn_cli.training.precision import repeatable

RANK = 16


def _adapted(given: TrainingInputs, rate: float) -> Trained | None:
    """Train adapters beside the head, and put them into the weights."""
    from peft import LoraConfig, get_peft_model

    loaded = given.build()
    heads = [
        name
        for name, part in loaded.model.named_children()
        if name != loaded.model.base_model_prefix and next(part.parameters(), None) is not None
    ]
    saved = heads if loaded.task in CLASSIFIERS else None
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", modules_to_save=saved)
    with repeatable(loaded.model.device, 0):  # adapters begin with random numbers, and an audit must be repeatable
        adapted: Any = get_peft_model(loaded.model, config)
    trainable = VisibleParameters(TrainedPart.of(adapted), {})
    trained = fitted(given, loaded._replace(model=adapted), rate, trainable)
    return Trained(loaded._replace(model=adapted.merge_and_unload()), trained.steps)


LOW_RANK = Training(
    name="LoRA",
    source="Hu et al. 2021, LoRA",
    rates=(1e-3, 3e-3),
    run=_adapted,
)
