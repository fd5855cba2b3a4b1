"""The proxy as a teacher: agree with it on public examples first, then train every weight with their labels.

A proxy answers with the whole network as it was sent, so its outputs may hold what its single weights do not.
"""

from __future__ import annotations

from typing import Any

import torch

from fedqsn_cli.auditing.recovery.attackers.attack import Trained, Training, TrainingInputs
from fedqsn_cli.auditing.recovery.attackers.full import fitted
from fedqsn_cli.training.scoring.teachers import TAUGHT_TASKS, Distillation, Lesson, listen
from fedqsn_cli.training.steps.compact import VisibleParameters
from fedqsn_cli.training.steps.loop import Surroundings, train

_BATCH = 32


def _distilled(given: TrainingInputs, rate: float) -> Trained | None:
    if given.examples.task not in TAUGHT_TASKS:
        return None
    loaded = given.build()
    teacher: Any = given.teacher().model.to(loaded.model.device).eval()
    with torch.no_grad():
        said = listen(teacher, given.examples, _BATCH, given.padding, given.progress)
    del teacher
    lesson = Distillation([Lesson(given.examples, said, 1.0)])
    around, trainable = Surroundings(backward=lesson.backward), VisibleParameters(loaded.model, {})
    first = train(loaded.model, lesson.examples, trainable, given.recipe(rate), given.padding, given.progress, around)
    then = fitted(given, loaded, rate)
    return Trained(then.loaded, first.steps + then.steps)


DISTILLATION = Training(
    name="distillation from the proxy",
    source="model extraction, Tramèr et al. 2016; Hinton et al. 2015",
    rates=(3e-4,),
    run=_distilled,
    of_base=False,
)
