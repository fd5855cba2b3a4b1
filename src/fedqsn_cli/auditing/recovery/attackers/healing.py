"""Only what no proxy shows is trained: what is known already need not be learnt again."""

from __future__ import annotations

from fedqsn_cli.auditing.recovery.attackers.attack import Trained, Training, TrainingInputs
from fedqsn_cli.auditing.recovery.attackers.full import fitted
from fedqsn_cli.training.compact import VisibleParameters


def _healed(given: TrainingInputs, rate: float) -> Trained | None:
    holes = given.holes()
    if not holes:
        return None
    loaded = given.build()
    for name, parameter in loaded.model.named_parameters():
        parameter.requires_grad_(name in holes)
    return fitted(given, loaded, rate, VisibleParameters(loaded.model, holes))


HEALING = Training(
    name="healing",
    source="recovery after pruning, LLM-Pruner, Ma et al. 2023",
    rates=(3e-4, 1e-3),
    run=_healed,
    of_base=False,
)
