"""Proxies of several rounds: every round may show other units, and rounds what both show anew.

The server model moves between rounds, but little next to what quantization does to it. Where clients train the holes
(`--train all`), what changed in them from round to round is what training taught; an attacker goes on that way.
"""

from __future__ import annotations

from fedqsn_cli.auditing.recovery.attackers.assembly import Assembly, Estimate, Floats, State
from fedqsn_cli.auditing.recovery.attackers.attack import Start
from fedqsn_cli.auditing.recovery.attackers.base_fill import filled
from fedqsn_cli.auditing.recovery.evidence import Evidence
from fedqsn_cli.models.dense import load_dense


def _newest(evidence: Evidence, base: Floats | None) -> Floats:
    """What the last round showed of each weight."""
    return filled(evidence.first, evidence, base)


def _averaged(evidence: Evidence, base: Floats | None) -> Floats:
    """The mean of all rounds, in which rounding falls out."""
    return filled(evidence.mean, evidence, base)


def _further(assembly: Assembly) -> State:
    """The last proxy, moved once more by what changed since the first one."""
    last, first = (load_dense(assembly.everything[place].checkpoint) for place in (0, -1))
    return {name: value + (value - first[name]) if value.is_floating_point() else value for name, value in last.items()}


def _of_rounds(name: str, source: str, estimate: Estimate) -> Start:
    return Start(
        name=lambda assembly: name + (", base fill" if assembly.has_base else ""),
        source=source,
        applies=lambda assembly: bool(assembly.inputs.earlier),
        build=lambda assembly: assembly.estimated(estimate, assembly.everything),
        filled=True,
    )


ROUNDS = _of_rounds("union of rounds", "FedQSN, arXiv 2508.18911: fresh masks show other units in every round", _newest)
ROUNDS_AVERAGED = _of_rounds("rounds averaged", "dithered quantization, averaged: Gray and Stockham 1993", _averaged)
DIFFERENCE = Start(
    name=lambda assembly: "difference of rounds",
    source="task arithmetic, Ilharco et al. 2023",
    applies=lambda assembly: bool(assembly.inputs.earlier) and assembly.everything[0].manifest.train == "all",
    build=_further,
    filled=True,
)
