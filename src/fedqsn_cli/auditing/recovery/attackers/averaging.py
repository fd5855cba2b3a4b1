"""Rounding undone: several proxies that round a weight differently leave a smaller interval for it."""

from __future__ import annotations

from fedqsn_cli.auditing.recovery.attackers.assembly import Floats
from fedqsn_cli.auditing.recovery.attackers.attack import Start
from fedqsn_cli.auditing.recovery.attackers.base_fill import filled
from fedqsn_cli.auditing.recovery.attacks import clamp, intersect
from fedqsn_cli.auditing.recovery.evidence import Evidence


def _unrounded(evidence: Evidence, base: Floats | None) -> Floats:
    """The middle of the intervals; with a public base, the base moved into them."""
    shown = intersect(evidence, base) if base is None else clamp(evidence, base)
    return filled(shown, evidence, base)


AVERAGING = Start(
    name=lambda assembly: "rounding undone" + (", base fill" if assembly.has_base else ""),
    source="consistent reconstruction from overlapping quantizers, Goyal, Vetterli and Thao 1998",
    applies=lambda assembly: assembly.has_base or not assembly.alone,
    build=lambda assembly: assembly.estimated(_unrounded),
    filled=True,
)
