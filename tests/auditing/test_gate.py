"""The gate: what is over a limit, worse than before, missing or waived, and the exit code of it all."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from fedqsn_cli.auditing.completeness import Collector
from fedqsn_cli.auditing.findings import Audit, Check, CurvePoint, Finding, FunctionRecovery, Recovery
from fedqsn_cli.auditing.gate import evaluate_policy
from fedqsn_cli.auditing.limits.measured import Measured
from fedqsn_cli.auditing.limits.regression import measures
from fedqsn_cli.auditing.policy import AllLimits, Budget, Clear, Limits, Policy, Regression, Scope, Threat, Waiver
from fedqsn_cli.auditing.report.headline import headline
from fedqsn_cli.exposure.exposure import exposure
from fedqsn_cli.exposure.results import Coalition, Exposure
from support.audits import finding, job, recovery, score
from support.ledgers import Line

TODAY = datetime.date(2026, 11, 23)
MODEL = job(layers=1)
SEEN = exposure(MODEL, [Line(f"c{c}", r, "fresh", 0.5) for c in range(4) for r in range(2)])
ALONE, TOGETHER = recovery("proxy a", MODEL), recovery("coalition of 2", MODEL, 1.0)


NOTHING = Measured()


def judged(policy: Policy, measured: Measured = NOTHING, *before: Finding, checks: Sequence[Check] = ()) -> Audit:
    return Audit(*evaluate_policy(policy, measured, Collector(list(before), list(checks)), today=TODAY))


def limits(**tables: Any) -> Policy:
    """A policy of these [limits]."""
    return Policy(limits=AllLimits(**tables))


def rules(audit: Audit) -> list[tuple[str, str]]:
    return [(one.rule, one.severity) for one in audit.findings]


def with_peak(measure: str, value: float) -> Recovery:
    worst = replace_score(ALONE.attack_table[-1], measure, value)
    return replace(ALONE, attack_table=(worst,), best=worst)


def replace_score(old: Any, measure: str, value: float) -> Any:
    return old._replace(**{measure: value})


# ------------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize(
    ("measure", "rule", "limit", "within", "beyond"),
    [
        ("exact_share", "FQ201", 0.05, 0.05, 0.0501),
        ("log10_nmse", "FQ202", -2.0, -2.0, -2.001),
        ("cosine", "FQ203", 0.98, 0.98, 0.981),
        ("delta_recovered", "FQ204", 0.5, 0.5, 0.51),
    ],
)
def test_a_limit_is_still_allowed_and_anything_beyond_is_not(
    measure: str, rule: str, limit: float, within: float, beyond: float
) -> None:
    policy = limits(proxy=Limits(**{measure: limit}))
    assert judged(policy, Measured((with_peak(measure, within),))).exit_code == 0
    failed = judged(policy, Measured((with_peak(measure, beyond),)))
    assert (failed.exit_code, rules(failed)) == (1, [(rule, "gate")])
    assert (failed.findings[0].value, failed.findings[0].limit) == (beyond, limit)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("measure", ["exact_share", "log10_nmse", "cosine", "delta_recovered"])
def test_a_measure_that_is_no_number_is_never_within_a_limit(measure: str, value: float) -> None:
    audit = judged(Policy(), Measured((with_peak(measure, value),)))
    assert (audit.exit_code, rules(audit)) == (3, [("FQ902", "incomplete")])


def test_proxies_and_coalitions_have_limits_of_their_own() -> None:
    policy = limits(coalition=Limits(cosine=0.955))
    audit = judged(policy, Measured((ALONE, TOGETHER)))
    assert [(one.rule, one.scope) for one in audit.findings] == [("FQ203", "coalition of 2")]


def test_the_worst_attack_counts_measure_by_measure() -> None:
    table = (score("one", 0.5, -0.5, 0.1, None), score("two", 0.0, -3.0, 0.2, None))
    found = replace(ALONE, attack_table=table, best=table[1])
    audit = judged(limits(proxy=Limits(exact_share=0.4, log10_nmse=-2.0)), Measured((found,)))
    assert {one.rule for one in audit.findings} == {"FQ201", "FQ202"}


def test_a_limit_for_tensors_names_the_tensor_and_leaves_norms_alone() -> None:
    audit = judged(limits(tensor=Limits(exact_share=0.01)), Measured((ALONE,)))
    assert {one.tensor for one in audit.findings} == set(MODEL.groups)


def test_a_limit_on_the_difference_without_a_base_is_not_complete() -> None:
    audit = judged(limits(proxy=Limits(delta_recovered=0.5)), Measured((recovery("proxy a", MODEL, delta=False),)))
    assert (audit.exit_code, rules(audit)) == (3, [("FQ901", "incomplete")])
    assert "--public-base" in audit.findings[0].message


@pytest.mark.parametrize(("gain", "code"), [(0.5, 0), (0.51, 1), (None, 3)])
def test_the_gain_over_the_base_is_held_against_its_limit_and_must_be_measured(gain: float | None, code: int) -> None:
    curve = (CurvePoint(8, 0.4, None, 0.95, 0.5, -0.1), CurvePoint(64, 0.4, None, 0.95, 0.5, gain))
    function = FunctionRecovery("proxy a", (), "base", 1.0, 0.9, "as sent", curve if gain is not None else ())
    assert judged(limits(proxy=Limits(gain=0.5)), Measured(function=function)).exit_code == code


def test_a_gain_that_there_was_no_time_for_is_told_from_a_base_that_is_missing() -> None:
    curve = (CurvePoint(8, 0.4, None, 0.95, None, None),)
    left_out = ("base, fine-tuning, 8 examples",)
    function = FunctionRecovery("proxy a", (), "base", 1.0, 0.9, "as sent", curve, left_out=left_out)
    found = judged(limits(proxy=Limits(gain=0.5)), Measured(function=function))
    (why,) = [check.why for check in found.checked if check.rule == "FQ302" and check.status == "not-run"]
    assert found.exit_code == 3 and why.endswith("which --attack-minutes left out")
    assert (
        "the base alone may give any share"
        in dict(headline(replace(found, function=function)))["skill with 8 public examples"]
    )


@pytest.mark.parametrize("scope", ["proxy a", "coalition of 3"])
@pytest.mark.parametrize("table", ["proxy", "coalition"])
@pytest.mark.parametrize("measure", ["rho", "gain"])
def test_a_limit_on_skill_holds_whatever_was_measured_together(scope: str, table: str, measure: str) -> None:
    curve = (CurvePoint(8, 0.4, None, 0.984, 0.5, 0.984),)
    function = FunctionRecovery(scope, (), "base", 1.0, 0.984, "as sent", curve)
    policy = limits(**{table: Limits(**{measure: 0.5})})
    assert judged(policy, Measured(function=function)).exit_code == 1


def test_a_limit_of_coalitions_holds_for_a_single_proxy() -> None:
    assert judged(limits(coalition=Limits(cosine=0.1)), Measured((ALONE,))).exit_code == 1
    assert judged(limits(coalition=Limits(log10_nmse=2.0)), Measured((ALONE,))).exit_code == 1


@pytest.mark.parametrize(("rho", "code"), [(0.9, 0), (0.91, 1), (None, 3)])
def test_rho_is_held_against_its_limit_and_must_be_defined(rho: float | None, code: int) -> None:
    function = FunctionRecovery("proxy a", (), "base", 1.0, rho, "as sent")
    assert judged(limits(proxy=Limits(rho=0.9)), Measured(function=function)).exit_code == code


# ------------------------------------------------------------------------------------------------ exposure


def test_clients_coalitions_and_clear_parameters_have_budgets() -> None:
    assert (
        judged(
            Policy(limits=AllLimits(clear=Clear(share=0.02)), budget=Budget(client=0.95, coalition=0.95)),
            Measured(exposure=SEEN),
        ).exit_code
        == 0
    )
    audit = judged(
        Policy(limits=AllLimits(clear=Clear(share=0.0001)), budget=Budget(client=0.5, coalition=0.6)),
        Measured(exposure=SEEN),
    )
    assert [one.rule for one in audit.findings] == ["FQ101", "FQ102", "FQ103"]


def test_a_coalition_that_cannot_be_ruled_out_counts() -> None:
    unsure = Coalition(3, ("a", "b", "c"), 0.7, "greedy", 100, 0.8)
    seen = replace(SEEN, coalitions=(unsure,))
    assert judged(Policy(budget=Budget(coalition=0.85)), Measured(exposure=seen)).exit_code == 0
    audit = judged(Policy(budget=Budget(coalition=0.75)), Measured(exposure=seen))
    assert (audit.exit_code, audit.findings[0].value) == (1, 0.8)


def test_more_colluders_than_clients_are_all_clients() -> None:
    audit = judged(Policy(budget=Budget(coalition=0.1), threat=Threat(colluders=50)), Measured(exposure=SEEN))
    assert [one.rule for one in audit.findings] == ["FQ102"]


def test_planned_rounds_are_judged_before_they_happen() -> None:
    measured = Measured(exposure=SEEN, expected=0.97)
    assert (
        judged(Policy(budget=Budget(client=0.96), threat=Threat(rounds=10)), measured).findings[0].scope
        == "planned rounds"
    )


def test_an_empty_ledger_has_passed_nothing() -> None:
    audit = judged(Policy(budget=Budget(client=1.0)), Measured(exposure=exposure(MODEL, [])))
    assert (audit.exit_code, rules(audit)) == (3, [("FQ901", "incomplete")])


# ------------------------------------------------------------------------------------------------ required, baseline


def test_what_is_required_and_could_not_run_is_not_complete() -> None:
    policy = Policy(scope=Scope(require=("FQ001",)))
    assert judged(policy).exit_code == 3
    skipped = judged(policy, checks=[Check("FQ001", "proxy a", "not-run", "needs --truth")])
    assert skipped.findings[0].message.endswith("could not be checked: needs --truth")
    passed = judged(policy, checks=[Check("FQ001", "proxy a", "pass", "")])
    assert passed.findings == ()
    both = [Check("FQ001", "proxy a", "pass", ""), Check("FQ001", "proxy b", "not-run", "why")]
    assert judged(policy, checks=both).exit_code == 3


def test_no_measure_may_be_worse_than_before_by_more_than_is_allowed() -> None:
    before = measures((ALONE,), None, SEEN)
    assert judged(Policy(), Measured((ALONE,), exposure=SEEN, baseline=before)).exit_code == 0
    for name, step in (("proxy exact_share", -0.01), ("proxy log10_nmse", 0.1), ("client exposure", -0.1)):
        audit = judged(Policy(), Measured((ALONE,), exposure=SEEN, baseline={**before, name: before[name] + step}))
        assert [(one.rule, one.scope) for one in audit.findings] == [("FQ205", name)]
    lenient = Policy(regression=Regression(exact_share=0.02))
    worse = {**before, "proxy exact_share": before["proxy exact_share"] - 0.01}
    assert judged(lenient, Measured((ALONE,), exposure=SEEN, baseline=worse)).exit_code == 0
    better = {**before, "proxy exact_share": before["proxy exact_share"] + 0.01}
    assert judged(Policy(), Measured((ALONE,), exposure=SEEN, baseline=better)).exit_code == 0


def test_a_baseline_that_shares_no_measure_proves_nothing() -> None:
    required = Policy(scope=Scope(require=("FQ205",)))
    assert judged(required, Measured((ALONE,), baseline={"rho": 0.5})).exit_code == 3
    assert judged(required, Measured((ALONE,))).exit_code == 3


# ------------------------------------------------------------------------------------------------ waivers


def waiver(**other: Any) -> Waiver:
    return Waiver(**{"rule": "FQ203", "reason": "why", "owner": "me", "expires": TODAY} | other)


OVER = Measured((ALONE,))
STRICT = limits(proxy=Limits(cosine=0.5))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({}, 0),
        ({"expires": TODAY - datetime.timedelta(days=1)}, 3),
        ({"rule": "FQ201"}, 1),
        ({"tensor": "*embed*"}, 1),
        ({"scope": "proxy *"}, 0),
        ({"scope": "coalition*"}, 1),
    ],
)
def test_a_waiver_covers_its_rule_tensor_and_scope_until_its_last_day(change: dict[str, Any], code: int) -> None:
    assert judged(STRICT.model_copy(update={"waiver": (waiver(**change),)}), OVER).exit_code == code


def test_what_is_waived_stays_in_sight() -> None:
    (one,) = judged(STRICT.model_copy(update={"waiver": (waiver(),)}), OVER).findings
    assert one.severity == "info"
    assert one.message.endswith("(waived until 2026-11-23 by me: why)")


def test_hard_and_incomplete_findings_cannot_be_waived() -> None:
    for rule, code in (("FQ001", 4), ("FQ901", 3)):
        policy = Policy(waiver=(waiver(rule=rule),))
        assert judged(policy, Measured(), finding(rule, "proxy a", "broken")).exit_code == code


def test_an_expired_waiver_is_not_complete_even_if_nothing_needs_it() -> None:
    old = waiver(expires=TODAY - datetime.timedelta(days=1))
    assert judged(Policy(waiver=(old,))).exit_code == 3


def test_a_waiver_that_covers_nothing_is_only_told() -> None:
    audit = judged(Policy(waiver=(waiver(),)))
    assert (audit.exit_code, rules(audit)) == (0, [("FQ905", "info")])


# ------------------------------------------------------------------------------------------------ exit codes


def test_the_worst_finding_decides_the_exit_code() -> None:
    hard, limit, open_, note = (
        finding("FQ001", "x", ""),
        finding("FQ201", "x", ""),
        finding("FQ901", "x", ""),
        replace(finding("FQ201", "x", ""), severity="info"),
    )
    for findings, code in (
        ((), 0),
        ((note,), 0),
        ((limit, note), 1),
        ((limit, open_), 3),
        ((limit, open_, hard), 4),
        ((hard,), 4),
    ):
        assert Audit(findings, ()).exit_code == code


def test_measures_are_the_worst_of_each_kind() -> None:
    found = measures((ALONE, replace(ALONE, scope="proxy b"), TOGETHER), None, SEEN)
    assert found["proxy cosine"] == ALONE.peak.cosine
    assert found["coalition cosine"] == TOGETHER.peak.cosine
    assert found["client exposure"] == max(client.shares[-1] for client in SEEN.clients)
    assert isinstance(SEEN, Exposure) and f"coalition of {len(SEEN.clients)} exposure" in found
