"""What an audit finds, as values: findings, checks that ran, measurements, and the exit code that follows from them.

Nothing here may hold a hidden position, a weight or a key: whatever prints these values prints all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from fedqsn_cli.exposure.results import Exposure

Severity = Literal["hard", "gate", "incomplete", "info"]
Status = Literal["pass", "fail", "not-run"]
Verdict = Literal["broken", "incomplete", "over the limits", "passed"]

LEAST_LOG10 = -16.0
"""log10 of a squared error that is zero, or too small for double precision to tell from zero."""

EXIT_CODES: dict[Verdict, int] = {"broken": 4, "incomplete": 3, "over the limits": 1, "passed": 0}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Args:
        rule: id of the rule, "FQ001".
        scope: what it is about: "proxy alice-r1" (the directory's name as given), "coalition of 3", "ledger", "after".
        tensor: the tensor, if it is about one.
        message: one sentence; never a hidden position, a weight or a key.
        value, limit: what was measured and what is allowed, where that is a number.
    """

    rule: str
    scope: str
    tensor: str | None
    message: str
    value: float | None
    limit: float | None
    severity: Severity


class Check(NamedTuple):
    """That a rule was applied to a scope, and how that ended; `why` says what was compared, or what was missing."""

    rule: str
    scope: str
    status: Status
    why: str


Entry = Finding | Check
"""What a check gives: what is wrong, and what was looked at."""


class AttackScore(NamedTuple):
    """What one attack recovers of all weights together.

    Args:
        exact_share: share of all parameters that the attacker holds exactly, 0 to 1.
        log10_nmse: log10 of ||W - W'||² / ||W||² over all parameters, hidden ones included.
        cosine: between W and W', over all parameters.
        delta_recovered: 1 - ||W - W'||² / ||W - B||², None without a public base B; below 0 when B itself is nearer.
        log10_nmse_visible: as log10_nmse, over the parameters that the attacker was shown.
        delta_direction: squared cosine between W' - B and W - B: the share of ||W - B||² that an attacker recovers who
            scales W' - B as is best; None where it was not measured.
    """

    attack: str
    exact_share: float
    log10_nmse: float
    cosine: float
    delta_recovered: float | None
    log10_nmse_visible: float
    delta_direction: float | None = None


@dataclass(frozen=True, slots=True)
class TensorRecovery:
    """What the best attack on one tensor recovers of it; the measures are those of `AttackScore`.

    Args:
        parameters: number of elements. visible_share: share of them that the attacker was shown.
        attack: the attack with the least error.
    """

    tensor: str
    role: str
    parameters: int
    visible_share: float
    exact_share: float
    log10_nmse: float
    cosine: float
    delta_recovered: float | None
    attack: str
    log10_nmse_visible: float


@dataclass(frozen=True, slots=True)
class Recovery:
    """Weight recovery from one proxy or from several: a lower bound on what leaks, since other attacks may exist.

    Args:
        best: the attack with the least error over all parameters. "best of each tensor" takes another one per tensor.
    """

    scope: str
    attack_table: tuple[AttackScore, ...]
    best: AttackScore
    tensors: tuple[TensorRecovery, ...]

    @property
    def peak(self) -> AttackScore:
        """The worst case for the owner, measure by measure over all attacks: what limits are held against."""
        table = self.attack_table
        deltas = [score.delta_recovered for score in table if score.delta_recovered is not None]
        directions = [score.delta_direction for score in table if score.delta_direction is not None]
        return AttackScore(
            "worst of all",
            _worst([score.exact_share for score in table], max),
            _worst([score.log10_nmse for score in table], min),
            _worst([score.cosine for score in table], max),
            _worst(deltas, max) if deltas else None,
            _worst([score.log10_nmse_visible for score in table], min),
            _worst(directions, max) if directions else None,
        )


def _worst(values: list[float], pick: Any) -> float:
    """max or min that a NaN cannot hide from."""
    return math.nan if not values or any(math.isnan(value) for value in values) else float(pick(values))


class ModelScore(NamedTuple):
    """How good one model is on the owner's data. `model` is global, server, proxy, attacked or base."""

    model: str
    loss: float
    accuracy: float | None


class CurvePoint(NamedTuple):
    """The attacked proxy after training with so many public examples.

    Args:
        rho: of this or of the trained base, whichever is better; so it holds what the examples alone teach.
        base_loss: the public base after the same training; None without a base that works.
        gain: ρ with that for a floor: what the proxies add to the examples.
        attack: weights and training that served the attacker best.
    """

    public_examples: int
    loss: float
    accuracy: float | None
    rho: float | None
    base_loss: float | None = None
    gain: float | None = None
    attack: str | None = None


class Attempt(NamedTuple):
    """One attack on the function, at its best.

    Args:
        source: who describes it. public_examples: how many it used. steps: optimizer steps over all rates tried.
    """

    attack: str
    source: str
    public_examples: int
    loss: float
    accuracy: float | None
    steps: int


@dataclass(frozen=True, slots=True)
class FunctionRecovery:
    """How much of the model's function an attacker gets.

    Args:
        scores: of the global model, server model, proxy, best attacked proxy and public base, those that were measured.
        floor: what counts as "nothing leaked": the public base, or a model that knows the data's averages only.
        rho: (L_floor - L_attack) / (L_floor - L_global); 1 is all of it, None when the global model is no better than
            the floor.
        attack: which weights the attacker starts from.
        curve: rho over the number of public examples that the attacker trains with.
        attempts: everything that was tried. left_out: what was not, since the time was over.
    """

    scope: str
    scores: tuple[ModelScore, ...]
    floor: str
    floor_loss: float
    rho: float | None
    attack: str
    curve: tuple[CurvePoint, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Audit:
    """A whole audit.

    Args:
        checked: every rule that was applied, or could not be.
        policy: summary of the policy that it was held against.
        inputs: what was audited: name -> digest, never a path.
    """

    findings: tuple[Finding, ...]
    checked: tuple[Check, ...]
    recovery: tuple[Recovery, ...] = ()
    function: FunctionRecovery | None = None
    exposure: Exposure | None = None
    policy: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    version: str = ""

    @property
    def verdict(self) -> Verdict:
        """The worst severity among the findings; those that a waiver covers must be removed before."""
        severities = {finding.severity for finding in self.findings}
        if "hard" in severities:
            return "broken"
        if "incomplete" in severities:
            return "incomplete"
        return "over the limits" if "gate" in severities else "passed"

    @property
    def exit_code(self) -> int:
        """4 a hard invariant is broken, 3 not complete, 1 over a limit, 0 passed."""
        return EXIT_CODES[self.verdict]
