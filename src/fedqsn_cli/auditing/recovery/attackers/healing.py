"""Only what no proxy shows is trained: what is known already need not be learnt again."""

from __future__ import annotations

from fedqsn_cli.auditing.recovery.attackers.attack import Lab, Trained, Training
from fedqsn_cli.training.compact import VisibleParameters
from fedqsn_cli.training.loop import train


def _healed(lab: Lab, rate: float) -> Trained | None:
    holes = lab.holes()
    if not holes:
        return None
    loaded = lab.build()
    for name, parameter in loaded.model.named_parameters():
        parameter.requires_grad_(name in holes)
    trainable = VisibleParameters(loaded.model, holes)
    summary = train(loaded.model, lab.examples, trainable, lab.recipe(rate), lab.padding, lab.progress)
    return Trained(loaded, summary.steps)


HEALING = Training(
    name="healing",
    source="recovery after pruning, LLM-Pruner, Ma et al. 2023",
    rates=(3e-4, 1e-3),
    run=_healed,
    of_base=False,
)
