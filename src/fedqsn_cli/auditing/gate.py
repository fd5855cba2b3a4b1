"""From measurements to findings: limits, budgets, the baseline, what is required, and waivers."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedqsn_cli.auditing.findings import Audit, Check, Finding, FunctionRecovery, Recovery
from fedqsn_cli.auditing.policy import Limits, Policy
from fedqsn_cli.auditing.rules import RULES, finding
from fedqsn_cli.exposure.results import Exposure

MEASURES = {"exact_share": "FQ201", "log10_nmse": "FQ202", "cosine": "FQ203", "delta_recovered": "FQ204"}
WITHOUT_UNITS = frozenset({"norm", "bias", "buffer"})  # roles that no limit for single tensors is meant for
NOISE = 1e-9  # differences that are none

_PHRASES = {
    "exact_share": "share of all parameters recovered exactly",
    "log10_nmse": "log10 of the remaining normalised squared error",
    "cosine": "cosine between the weights and their reconstruction",
    "delta_recovered": "share of the secret difference recovered",
    "rho": "share of the model's function recovered",
    "gain": "share of the function that the proxies add to what public examples teach the base",
    "exposure": "share of all parameters seen",
    "clear_share": "share of all parameters in the clear",
}


@dataclass(frozen=True)
class Measured:
    """Everything that was measured; None for what was not."""

    recovery: tuple[Recovery, ...] = ()
    function: FunctionRecovery | None = None
    exposure: Exposure | None = None
    expected: float | None = None  # exposure of one client after policy.rounds fresh proxies


@dataclass
class _Result:
    findings: list[Finding]
    checked: list[Check]

    def judge(
        self, rule: str, scope: str, what: str, value: float, limit: float | None, tensor: str | None = None
    ) -> None:
        """Hold a value against a limit; a NaN is never within it. Single tensors are listed only when they fail."""
        least = rule == "FQ202"  # an error: the less, the worse
        if not math.isfinite(value):
            message = f"{what} is not a finite number"
            self.findings.append(finding("FQ902", scope, message, tensor=tensor))
            self.checked.append(Check(rule, scope, "fail", message))
        elif limit is None:
            self.checked.append(Check(rule, scope, "pass", f"{what}: {value:.4g}; the policy sets no limit"))
        elif value < limit - NOISE if least else value > limit + NOISE:
            message = f"{what} is {value:.4g}, {'under' if least else 'over'} the limit of {limit:.4g}"
            self.findings.append(finding(rule, scope, message, tensor=tensor, value=value, limit=limit))
            self.checked.append(Check(rule, scope, "fail", message if tensor is None else f"{tensor}: {message}"))
        elif tensor is None:
            self.checked.append(Check(rule, scope, "pass", f"{what}: {value:.4g}; limit {limit:.4g}"))


def apply(
    policy: Policy,
    measured: Measured,
    findings: Sequence[Finding],
    checked: Sequence[Check],
    *,
    baseline: Mapping[str, float] | None = None,
    today: datetime.date,
) -> tuple[tuple[Finding, ...], tuple[Check, ...]]:
    """All findings and checks of an audit, those of the limits included.

    Args:
        findings, checked: what the invariants and the attacks gave.
        baseline: measure -> value in an earlier audit, as `measures` gives them.
        today: what the dates of waivers are held against.
    """
    result = _Result(list(findings), list(checked))
    _judge_exposure(result, policy, measured)
    for recovery in measured.recovery:
        _judge_recovery(result, policy, recovery)
    _judge_function(result, policy, measured.function)
    _judge_regression(result, policy, measured, baseline)
    _require(result, policy)
    waived = tuple(_waived(result.findings, policy, today))
    return waived, tuple(result.checked)


def _judge_exposure(result: _Result, policy: Policy, measured: Measured) -> None:
    exposure = measured.exposure
    if exposure is None:
        return
    worst = max(exposure.clients, key=lambda client: client.shares[-1], default=None)
    if worst is not None:
        what = f"what client {worst.client} has seen of all parameters"
        result.judge("FQ101", "clients", what, worst.shares[-1], policy.client_budget)
    if measured.expected is not None and policy.rounds is not None:
        what = f"what a client sees of all parameters in {policy.rounds} fresh proxies (expected)"
        result.judge("FQ101", "planned rounds", what, measured.expected, policy.client_budget)
    _judge_coalition(result, policy, exposure)
    result.judge("FQ103", "model", "share of all parameters in the clear", exposure.clear_share, policy.clear)


def _judge_coalition(result: _Result, policy: Policy, exposure: Exposure) -> None:
    """A coalition that may exist counts like one that was found: what is not ruled out has not passed."""
    size = min(policy.colluders, len(exposure.clients))
    coalition = next((one for one in exposure.coalitions if one.size == size), None)
    scope = f"coalition of {policy.colluders}"
    if coalition is None:
        if exposure.clients:  # one client is all the coalition that there is
            share = max(client.shares[-1] for client in exposure.clients)
            result.judge(
                "FQ102", scope, "what the only client has seen of all parameters", share, policy.coalition_budget
            )
        return
    limit = policy.coalition_budget
    unsure = coalition.at_most > coalition.share + NOISE and limit is not None and coalition.share <= limit
    what = f"what {size} clients together have seen of all parameters" + (" at most" if unsure else "")
    result.judge("FQ102", scope, what, coalition.at_most if unsure else coalition.share, limit)


def _judge_recovery(result: _Result, policy: Policy, recovery: Recovery) -> None:
    limits = policy.coalition if recovery.scope.startswith("coalition") else policy.proxy
    for measure, rule in MEASURES.items():
        value = getattr(recovery.peak, measure)
        if value is not None:
            result.judge(rule, recovery.scope, _PHRASES[measure], value, getattr(limits, measure))
        elif getattr(limits, measure) is not None:
            result.checked.append(Check(rule, recovery.scope, "not-run", "needs --public-base"))
    if policy.tensor != Limits():
        for tensor in recovery.tensors:
            if tensor.role not in WITHOUT_UNITS:
                _judge_tensor(result, policy.tensor, recovery.scope, tensor)


def _judge_tensor(result: _Result, limits: Limits, scope: str, tensor: Any) -> None:
    for measure, rule in MEASURES.items():
        value, limit = getattr(tensor, measure), getattr(limits, measure)
        if value is not None and limit is not None:
            result.judge(
                rule, scope, _PHRASES[measure].replace("all parameters", "its parameters"), value, limit, tensor.tensor
            )


def _judge_function(result: _Result, policy: Policy, function: FunctionRecovery | None) -> None:
    if function is None:
        return
    limits = policy.coalition if function.scope.startswith("coalition") else policy.proxy
    limit = limits.rho
    if function.rho is None:
        why = "rho is not defined: the global model is no better than the floor"
        result.checked.append(Check("FQ301", function.scope, "not-run", why))
    else:
        result.judge("FQ301", function.scope, _PHRASES["rho"], function.rho, limit)
    tuned = [point for point in function.curve if point.rho is not None]
    if tuned:
        best = max(tuned, key=lambda point: point.rho if point.rho is not None else -math.inf)
        what = f"{_PHRASES['rho']} after {best.public_examples} public examples"
        result.judge("FQ302", function.scope, what, best.rho if best.rho is not None else math.nan, limit)
    if limits.gain is None:
        return
    gains = [(point.gain, point.public_examples) for point in function.curve if point.gain is not None]
    if gains:
        most, examples = max(gains)
        result.judge("FQ302", function.scope, f"{_PHRASES['gain']}, {examples} of them", most, limits.gain)
    else:
        why = "the gain over the base needs --public-base, with all tensors of the model, and --public-data"
        result.checked = [check for check in result.checked if check.rule != "FQ302"]  # rho alone is not what was asked
        result.checked.append(Check("FQ302", function.scope, "not-run", why))


def measures(
    recovery: Sequence[Recovery], function: FunctionRecovery | None, exposure: Exposure | None
) -> dict[str, float]:
    """The worst value of every measure, by a name that stays the same from audit to audit: what baselines hold."""
    worst: dict[str, float] = {}
    for kind in ("proxy", "coalition"):
        peaks = [one.peak for one in recovery if one.scope.startswith(kind)]
        for measure in MEASURES:
            values = [value for peak in peaks if (value := getattr(peak, measure)) is not None]
            if values:
                worst[f"{kind} {measure}"] = min(values) if measure == "log10_nmse" else max(values)
    if function is not None and function.rho is not None:
        worst["rho"] = function.rho
    if exposure is not None:
        worst["clear_share"] = exposure.clear_share
        if exposure.clients:
            worst["client exposure"] = max(client.shares[-1] for client in exposure.clients)
        worst |= {f"coalition of {one.size} exposure": one.share for one in exposure.coalitions}
    return worst


def _judge_regression(
    result: _Result, policy: Policy, measured: Measured, baseline: Mapping[str, float] | None
) -> None:
    if baseline is None:
        return
    now = measures(measured.recovery, measured.function, measured.exposure)
    if not now.keys() & baseline.keys():
        result.checked.append(
            Check("FQ205", "baseline", "not-run", "this audit measured nothing that the baseline did")
        )
    for name in sorted(now.keys() & baseline.keys()):
        measure = next(key for key in _PHRASES if name.endswith(key))
        worse = baseline[name] - now[name] if measure == "log10_nmse" else now[name] - baseline[name]
        allowed = policy.regression.get(measure, 0.0)
        what = f"{name}: {baseline[name]:.4g} before, {now[name]:.4g} now; worsening"
        result.judge("FQ205", name, what, worse, allowed)


def _require(result: _Result, policy: Policy) -> None:
    """A required rule that was not applied, somewhere or anywhere, makes the audit incomplete."""
    for check in list(result.checked):
        if check.status == "not-run" and check.rule in policy.required:
            message = f"{check.rule} ({RULES[check.rule].name}) is required but could not be checked: {check.why}"
            result.findings.append(finding("FQ901", check.scope, message))
    applied = {check.rule for check in result.checked}
    for rule in sorted(policy.required - applied):
        why = f"needs {_NEEDS.get(rule, 'more inputs')}"
        result.checked.append(Check(rule, "audit", "not-run", why))
        message = f"{rule} ({RULES[rule].name}) is required but was not checked: {why}"
        result.findings.append(finding("FQ901", "audit", message))


_NEEDS = {
    **dict.fromkeys(("FQ101", "FQ102"), "--ledger with releases, and --key"),
    "FQ103": "--ledger and --key",
    **dict.fromkeys(MEASURES.values(), "a readable proxy, --truth and --key"),
    "FQ204": "a readable proxy, --truth, --key and --public-base",
    "FQ205": "--baseline",
    "FQ301": "a readable proxy, --truth, --key and --eval-data",
    "FQ302": "a readable proxy, --truth, --key, --eval-data and --public-data",
    **dict.fromkeys((f"FQ{number:03}" for number in range(1, 12)), "a readable proxy"),
}


def _waived(findings: Sequence[Finding], policy: Policy, today: datetime.date) -> Iterator[Finding]:
    """The findings, those that a waiver covers turned into information; waivers that have expired are findings too."""
    used = set()
    for one in findings:
        covering = [waiver for waiver in policy.waivers if one.severity == "gate" and waiver.covers(one)]
        used.update(covering)
        valid = next((waiver for waiver in covering if waiver.expires >= today), None)
        if valid is None:
            yield one
        else:
            note = f"{one.message} (waived until {valid.expires.isoformat()} by {valid.owner}: {valid.reason})"
            yield replace(one, severity="info", message=note)
    for waiver in policy.waivers:
        name = f"the waiver of {waiver.rule} for tensor {waiver.tensor!r} by {waiver.owner}"
        if waiver.expires < today:
            yield finding("FQ905", "policy", f"{name} expired on {waiver.expires.isoformat()}")
        elif waiver not in used:
            yield replace(finding("FQ905", "policy", f"{name} covers nothing that was found"), severity="info")


def worst_of(audit: Audit) -> list[Finding]:
    """The findings that decide the verdict, those of the worst kind."""
    kinds = {"broken": "hard", "incomplete": "incomplete", "over the limits": "gate"}
    return [one for one in audit.findings if one.severity == kinds.get(audit.verdict)]
