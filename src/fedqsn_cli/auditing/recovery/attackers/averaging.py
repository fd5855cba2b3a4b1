"""Rounding undone: several proxies that round a weight differently leave a smaller interval for it."""

from __future__ import annotations

from fedqsn_cli.auditing.recovery.attackers.assembly import Floats
from fedqsn_cli.auditing.recovery.attackers.attack import Start
from fedqsn_cli.auditing.recovery.attackers.base_fill import filled
from fedqsn_cli.auditing.recovery.attacks import intersect
from fedqsn_cli.auditing.recovery.evidence import Evidence


def _unrounded(evidence: Evidence, base: Floats | None) -> Floats:
    """The middle of the intervals that all codes leave, and the public base elsewhere."""
    return filled(intersect(evidence, base), evidence, base)


AVERAGING = Start(
    name=lambda assembly: "rounding undone" + (", base fill" if assembly.has_base else ""),
    source="consistent reconstruction from overlapping quantizers, Goyal, Vetterli and Thao 1998",
    applies=lambda assembly: not assembly.alone,
    build=lambda assembly: assembly.estimated(_unrounded),
    filled=True,
)
