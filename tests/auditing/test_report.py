"""Every format: valid by its own rules, complete, and harmless to whatever reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from auditing.constructed import CASES, ENDINGS, NASTY, golden, rendered
from fedqsn_cli.auditing.findings import Audit, Check, Finding
from fedqsn_cli.auditing.limits.regression import measures
from fedqsn_cli.auditing.report import FORMATS, render, sarif
from fedqsn_cli.auditing.report.headline import NO_BASE, NO_EXAMPLES, NO_LIMIT, NOT_MEASURED, PROXY_ALONE
from fedqsn_cli.auditing.report.json import read_measures
from fedqsn_cli.auditing.rules import RULES
from fedqsn_cli.errors import FormatError, InputError
from support.audits import audit, finding

VERDICTS = ("passed", "over the limits", "incomplete", "broken")
FORMAT = '{"format": "fedqsn-audit/1"}'


def nasty() -> Audit:
    """An audit whose names try to break every format."""
    found = tuple(Finding(rule, f"proxy {NASTY}", NASTY, NASTY, None, None, "gate") for rule in ("FQ201", "FQ202"))
    return replace(audit(), findings=found, checked=(Check("FQ201", f"proxy {NASTY}", "fail", NASTY),))


@pytest.mark.parametrize(("name", "format_name"), CASES)
def test_every_report_is_the_approved_one_byte_for_byte(name: str, format_name: str) -> None:
    """`python tests/auditing/constructed.py` writes them anew."""
    assert rendered(name, format_name) == golden(name, format_name).read_bytes()


def test_there_is_no_format_without_an_approved_report() -> None:
    assert set(ENDINGS) == {*FORMATS, "html"} == {format_name for _, format_name in CASES}


@pytest.mark.parametrize("form", [*FORMATS, "html"])
@pytest.mark.parametrize("verdict", VERDICTS)
def test_every_format_tells_every_verdict_and_every_finding(form: str, verdict: str) -> None:
    made = render(audit(verdict=verdict), form)
    assert made.endswith("\n")
    for one in audit(verdict=verdict).findings:
        assert one.rule in made


@pytest.mark.parametrize("form", [*FORMATS, "html"])
def test_the_same_audit_gives_the_same_bytes(form: str) -> None:
    assert render(audit(), form) == render(audit(), form)


@pytest.mark.parametrize("form", [*FORMATS, "html"])
def test_no_control_character_of_others_gets_through(form: str) -> None:
    made = render(nasty(), form)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", made)


# ------------------------------------------------------------------------------------------------ json


def test_json_holds_the_whole_audit_and_is_read_again_as_a_baseline(tmp_path: Path) -> None:
    given = audit(verdict="over the limits")
    document = json.loads(render(given, "json"))
    assert (document["verdict"], document["exit_code"]) == ("over the limits", 1)
    assert len(document["recovery"]) == 5 and document["recovery"][0]["attack_table"][0]["attack"] == "as sent"
    assert document["function"]["scores"][0] == {"model": "global", "loss": 0.41, "accuracy": 0.893}
    (tmp_path / "last.json").write_text(render(given, "json"))
    assert read_measures(tmp_path / "last.json") == measures(given.recovery, given.function, given.exposure)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"format": "fedqsn-audit/1"}', '{"format": "fedqsn-audit/1", "measures": {"x": "y"}}']
)
def test_a_baseline_that_is_no_audit_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "last.json").write_text(text)
    with pytest.raises(FormatError):
        read_measures(tmp_path / "last.json")
    with pytest.raises(InputError, match="--format json"):
        read_measures(tmp_path / "none.json")


def test_a_number_that_is_none_becomes_null() -> None:
    given = audit()
    broken = replace(given.recovery[0], best=given.recovery[0].best._replace(cosine=float("nan")))
    assert json.loads(render(replace(given, recovery=(broken,)), "json"))["recovery"][0]["best"]["cosine"] is None


# ------------------------------------------------------------------------------------------------ sarif


def checked_sarif(given: Audit) -> dict[str, object]:
    return checked(json.loads(render(given, "sarif")))


def checked(log: dict[str, object]) -> dict[str, object]:
    from pydantic_sarif.model import StaticAnalysisResultsFormatSarifVersion210JsonSchema as Schema

    Schema.model_validate_json(json.dumps(log))  # made from the official schema; unknown properties are refused
    return log


@pytest.mark.parametrize("verdict", VERDICTS)
def test_sarif_is_valid_against_the_schema(verdict: str) -> None:
    log = checked_sarif(audit(verdict=verdict))
    (run,) = log["runs"]  # type: ignore[misc]
    assert run["invocations"][0]["exitCode"] == audit(verdict=verdict).exit_code
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == list(RULES)
    for result in run["results"]:
        assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        assert (result["kind"] == "fail") == (result["level"] != "none")


def test_sarif_of_hostile_names_is_valid_and_keeps_its_results() -> None:
    (run,) = checked_sarif(nasty())["runs"]  # type: ignore[misc]
    assert [result["ruleId"] for result in run["results"]] == ["FQ201", "FQ202"]


def test_sarif_stays_within_what_sites_take_and_says_so() -> None:
    assert sarif.MOST_RESULTS == 25_000
    many = tuple(finding("FQ201", "proxy a", "m", tensor=f"t{i}") for i in range(17))
    (run,) = checked(sarif.document(replace(audit(), findings=many), most=10))["runs"]  # type: ignore[misc]
    assert len(run["results"]) == 10
    assert run["invocations"][0]["toolExecutionNotifications"][0]["message"]["text"].startswith("7 of 17 findings")


def test_fingerprints_follow_a_finding_whatever_was_measured() -> None:
    def prints(value: float) -> list[str]:
        given = replace(audit(), findings=(finding("FQ201", "proxy a", f"is {value}", value=value),))
        return [
            result["partialFingerprints"]["finding/v1"]
            for result in json.loads(render(given, "sarif"))["runs"][0]["results"]
        ]

    assert prints(0.1) == prints(0.2)


# ------------------------------------------------------------------------------------------------ other formats


def test_junit_has_one_case_a_rule_and_scope() -> None:
    root = ElementTree.fromstring(render(audit(verdict="over the limits"), "junit"))
    cases = [(case.get("classname"), case.get("name")) for case in root.iter("testcase")]
    assert len(cases) == len(set(cases)) == 5  # four checks, and a finding that no check stands for
    (suite,) = root.iter("testsuite")
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors"), suite.get("skipped")) == (
        "5",
        "2",
        "0",
        "1",
    )


def test_junit_tells_failures_from_errors() -> None:
    def kinds(verdict: str) -> list[str]:
        root = ElementTree.fromstring(render(audit(verdict=verdict), "junit"))
        return [child.tag for case in root.iter("testcase") for child in case if child.tag != "system-out"]

    assert kinds("broken") == ["failure", "skipped"]
    assert kinds("incomplete") == ["skipped", "error"]


def test_junit_of_hostile_names_is_well_formed() -> None:
    root = ElementTree.fromstring(render(nasty(), "junit"))
    assert len(list(root.iter("testcase"))) == 2


def test_github_gets_one_command_a_finding_and_one_for_the_verdict() -> None:
    lines = render(audit(verdict="over the limits"), "github").splitlines()
    assert lines[0].startswith("::error title=FQ101 client-exposure::clients: what client alice")
    assert lines[-1].startswith("::error title=fedqsn audit::over the limits (exit code 1)")
    assert render(audit(), "github").splitlines()[-1].startswith("::notice title=fedqsn audit::passed (exit code 0)")


def test_github_commands_cannot_be_injected() -> None:
    lines = render(nasty(), "github").splitlines()
    assert len(lines) == 3
    assert all(line.startswith("::error title=") for line in lines)
    assert "%250A::error::g" in lines[0]


def test_markdown_cells_stay_cells() -> None:
    rows = [line for line in render(nasty(), "markdown").splitlines() if line.startswith("| FQ")]
    assert len(rows) == 2
    assert all(len(re.split(r"(?<!\\)\|", row)) == 7 for row in rows)
    assert "<c>" not in rows[0].replace(r"\<c\>", "")


def test_text_is_short_and_says_what_it_is_worth() -> None:
    text = render(audit(verdict="over the limits", clients=60, rounds=2), "text")
    assert text.startswith("verdict  over the limits (exit code 1)")
    assert "a lower bound on the leakage" in text
    assert len(text.splitlines()) <= 90


ANSWERS = ("without examples", "1000 public examples", "the owner", "the public base")


@pytest.mark.parametrize("form", [*FORMATS, "html"])
def test_every_format_says_what_an_attacker_can_do_before_it_speaks_of_weights(form: str) -> None:
    made = render(audit(verdict="over the limits"), form)
    assert all(answer in made for answer in ANSWERS)
    weights = made.find("weight difference")
    if form in ("text", "markdown", "html"):
        assert made.index("without examples") < weights


@pytest.mark.parametrize("form", [*FORMATS, "html"])
def test_every_format_says_that_the_function_was_not_measured(form: str) -> None:
    given = replace(audit(), function=None)
    assert render(given, form).replace("&#39;", "'").replace("&apos;", "'").count(NOT_MEASURED) == 1
    assert NOT_MEASURED not in render(audit(), form).replace("&#39;", "'")


def test_nothing_is_green_where_nothing_is_known_about_skill() -> None:
    given = replace(audit(), function=None)
    page = render(given, "html")
    assert 'class="verdict unknown"' in page and 'class="verdict passed"' not in page
    assert "✅" not in render(given, "markdown")
    assert 'class="verdict passed"' in render(audit(), "html") and "✅" in render(audit(), "markdown")


def _changed(**change: Any) -> Audit:
    """An audit whose function was measured, of which something is missing."""
    policy = {"threat": {}, "limits": {"proxy": {"rho": 0.9}, "coalition": {}}, "sha256": "d" * 64}
    function = audit().function
    assert function is not None
    whole = replace(audit(), policy=policy)
    return replace(whole, **change) if "curve" not in change else replace(whole, function=replace(function, **change))


def _without_base() -> Audit:
    recoveries = [replace(one, best=one.best._replace(delta_recovered=None)) for one in audit().recovery]
    return _changed(recovery=tuple(recoveries))


OPEN_QUESTIONS = {
    "no limit": (lambda: _changed(policy={"limits": {"proxy": {"cosine": 0.9}}, "sha256": "d" * 64}), NO_LIMIT),
    "no examples": (lambda: _changed(curve=()), NO_EXAMPLES),
    "no base": (_without_base, NO_BASE),
}


@pytest.mark.parametrize(("make", "sentence"), OPEN_QUESTIONS.values(), ids=OPEN_QUESTIONS)
def test_a_pass_that_leaves_skill_open_says_so_and_is_not_green(make: Callable[[], Audit], sentence: str) -> None:
    given = make()
    page = render(given, "html")
    assert 'class="verdict unknown"' in page and "Passed, but not for skill" in page
    assert "✅" not in render(given, "markdown")
    assert sentence in render(given, "text") and sentence not in render(audit(), "text")


def test_a_model_without_a_public_base_needs_none() -> None:
    policy = {"threat": {"public_base": False}, "limits": {"proxy": {"rho": 0.9}}, "sha256": "d" * 64}
    assert NO_BASE not in render(replace(_without_base(), policy=policy), "text")


def test_whoever_has_only_the_proxy_is_told_first_what_cannot_be_known() -> None:
    given = replace(audit(), inputs={"proxy alice": "a" * 64}, function=None)
    text = render(given, "text")
    assert text.index(PROXY_ALONE) < text.index(NOT_MEASURED, text.index("cannot be known"))
    assert PROXY_ALONE not in render(audit(), "text")


@pytest.mark.parametrize("form", ["text", "markdown", "html"])
def test_where_nothing_masked_is_sent_nothing_is_said_of_the_rest(form: str) -> None:
    seen = audit().exposure
    assert seen is not None and "99 %" in render(audit(), form)
    nothing_sent = replace(audit(), exposure=replace(seen, hidden_share=1 - seen.clear_share))
    assert "99 %" not in render(nothing_sent, form)


def test_a_pass_without_limits_is_not_praised() -> None:
    given = replace(audit(), policy={"sha256": None})
    assert "No policy was given, so nothing was compared with a limit" in render(given, "text")
