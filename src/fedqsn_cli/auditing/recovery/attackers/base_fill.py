"""What all proxies show together, and the public base where none shows anything."""

from __future__ import annotations

import numpy as np

from fedqsn_cli.auditing.recovery.attackers.assembly import Floats
from fedqsn_cli.auditing.recovery.attackers.attack import Start
from fedqsn_cli.auditing.recovery.evidence import Evidence


def filled(shown: Floats, evidence: Evidence, base: Floats | None) -> Floats:
    """Values of shown weights, and the public base elsewhere."""
    return shown if base is None else np.where(evidence.count > 0, shown, base)


BASE_FILL = Start(
    name=lambda assembly: "descale, base fill" if assembly.alone else "union, base fill",
    source="the fine-tune differs little from its public base (Hu et al. 2021, LoRA)",
    applies=lambda assembly: assembly.has_base,
    build=lambda assembly: assembly.estimated(lambda evidence, base: filled(evidence.first, evidence, base)),
    filled=True,
)
