"""The proxy as a teacher: agree with it on public examples first, then train every weight with their labels.

A proxy answers with the whole network as it was sent, so its outputs may hold what its single weights do not.
"""

from __future__ import annotations

from typing import Any

import torch

from fedqsn_cli.auditing.recovery.attackers.attack import Lab, Trained, Training
from fedqsn_cli.auditing.recovery.attackers.full import fitted
from fedqsn_cli.training.compact import VisibleParameters
from fedqsn_cli.training.loop import Surroundings, train
from fedqsn_cli.training.teachers import TAUGHT_TASKS, Distillation, Lesson, listen

_BATCH = 32


def _distilled(lab: Lab, rate: float) -> Trained | None:
    if lab.examples.task not in TAUGHT_TASKS:
        return None
    loaded = lab.build()
    teacher: Any = lab.teacher().model.to(loaded.model.device).eval()
    with torch.no_grad():
        said = listen(teacher, lab.examples, _BATCH, lab.padding, lab.progress)
    del teacher
    lesson = Distillation([Lesson(lab.examples, said, 1.0)])
    around, trainable = Surroundings(backward=lesson.backward), VisibleParameters(loaded.model, {})
    first = train(loaded.model, lesson.examples, trainable, lab.recipe(rate), lab.padding, lab.progress, around)
    then = fitted(lab, loaded, rate)
    return Trained(then.loaded, first.steps + then.steps)


DISTILLATION = Training(
    name="distillation from the proxy",
    source="model extraction, Tramèr et al. 2016; Hinton et al. 2015",
    rates=(3e-4,),
    run=_distilled,
    of_base=False,
)
