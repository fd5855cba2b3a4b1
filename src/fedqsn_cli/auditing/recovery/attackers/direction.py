"""Each unit's direction from the proxies, its length from the public base.

Fine-tuning turns a unit's weights little and scales them less, so an attacker who does not trust the scale of what was
sent takes it from the base. ArrowMatch also finds units in another order; here all are in their places.
"""

from __future__ import annotations

import numpy as np

from fedqsn_cli.auditing.recovery.attackers.assembly import Floats
from fedqsn_cli.auditing.recovery.attackers.attack import Start
from fedqsn_cli.auditing.recovery.attackers.base_fill import filled
from fedqsn_cli.auditing.recovery.evidence import Evidence


def _matched(evidence: Evidence, base: Floats | None) -> Floats:
    """Rows with the direction of what is shown and the length that the base has there."""
    if base is None:
        return evidence.first
    shown = evidence.count > 0
    length = np.linalg.norm(np.where(shown, base, 0), axis=1, keepdims=True)
    sent = np.linalg.norm(np.where(shown, evidence.first, 0), axis=1, keepdims=True)
    factor = np.divide(length, sent, out=np.ones_like(sent), where=sent > 0)
    return filled(np.asarray(evidence.first * factor, np.float32), evidence, base)


DIRECTION = Start(
    name=lambda assembly: "direction matching, base fill",
    source="ArrowMatch, Wang et al., USENIX Security 2025",
    applies=lambda assembly: assembly.has_base,
    build=lambda assembly: assembly.estimated(_matched),
    filled=True,
)
