"""Low-rank adapters on every linear layer: few examples teach fewer numbers faster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from fedqsn_cli.auditing.recovery.attackers.attack import Lab, Trained, Training
from fedqsn_cli.models.architecture import CLASSIFIERS
from fedqsn_cli.training.compact import VisibleParameters
from fedqsn_cli.training.loop import train
from fedqsn_cli.training.precision import repeatable

RANK = 16


class _Trained:
    """The parameters of a model that have gradients."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, value) for name, value in self._model.named_parameters() if value.requires_grad)


def _adapted(lab: Lab, rate: float) -> Trained | None:
    """Train adapters beside the head, and put them into the weights."""
    from peft import LoraConfig, get_peft_model

    loaded = lab.build()
    heads = [
        name
        for name, part in loaded.model.named_children()
        if name != loaded.model.base_model_prefix and next(part.parameters(), None) is not None
    ]
    saved = heads if loaded.task in CLASSIFIERS else None
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", modules_to_save=saved)
    with repeatable(loaded.model.device, 0):  # adapters begin with random numbers, and an audit must be repeatable
        adapted: Any = get_peft_model(loaded.model, config)
    trainable = VisibleParameters(_Trained(adapted), {})
    summary = train(adapted, lab.examples, trainable, lab.recipe(rate), lab.padding, lab.progress)
    return Trained(loaded._replace(model=adapted.merge_and_unload()), summary.steps)


LOW_RANK = Training(
    name="LoRA",
    source="Hu et al. 2021, LoRA",
    rates=(1e-3, 3e-3),
    run=_adapted,
)
