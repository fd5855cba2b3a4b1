"""A rule is one declaration; everything that is known of rules is read from it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from fedqsn_cli.auditing.checks import AuditCheck, Together, check, once
from fedqsn_cli.auditing.completeness import Collector
from fedqsn_cli.auditing.findings import Check, Entry
from fedqsn_cli.auditing.inputs import KEY, TRUTH, Inputs
from fedqsn_cli.auditing.registry import Need, Rule, needed
from fedqsn_cli.auditing.rules import MODULES, RULES, SCOPES
from fedqsn_cli.cli.app import build
from fedqsn_cli.errors import FormatError
from support.processes import environment

RULE = Rule("FQ000", "of-the-tests", "hard", what="w", why="y", fix="f", needs=(TRUTH,))


def ran(audit_check: AuditCheck, inputs: Inputs | None = None) -> Collector:
    collector = Collector()
    audit_check.run(inputs or Inputs(), collector)
    return collector


def test_every_rule_is_declared_once() -> None:
    declared = {id(value): value for module in MODULES for value in vars(module).values() if isinstance(value, Rule)}
    assert len(declared) == len(RULES) == len({rule.name for rule in RULES.values()})
    assert list(RULES) == sorted(RULES)
    for rule in RULES.values():
        assert rule.what.endswith(".") and rule.why.endswith(".") and rule.fix.endswith("."), rule.id


def test_scopes_are_what_policies_require() -> None:
    invariants = ("FQ001", "FQ002", "FQ003", "FQ004", "FQ005", "FQ006", "FQ007", "FQ010", "FQ012", "FQ013", "FQ104")
    assert SCOPES == {  # noqa: SIM300
        "invariants": invariants,
        "merge": ("FQ008",),
        "exposure": ("FQ101", "FQ102", "FQ103", "FQ105"),
        "recovery": ("FQ201", "FQ202", "FQ203"),
        "regression": ("FQ205",),
        "function": ("FQ301", "FQ302"),
    }


def test_what_a_rule_needs_are_options_of_the_command() -> None:
    offered = {name for param in build("audit").params for name in param.opts}
    for rule in RULES.values():
        assert rule.severity == "incomplete" or rule.needs, rule.id
        assert set(re.findall(r"--[\w-]+", needed(*rule.needs) if rule.needs else "")) <= offered, rule.id


def test_the_rules_are_known_without_a_training_library() -> None:
    script = "import sys, fedqsn_cli.auditing.rules; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("needs", "sentence"),
    [
        ((KEY,), "needs --key"),
        ((TRUTH, KEY), "needs --truth and --key"),
        ((Need(("a readable proxy",), lambda inputs: None), TRUTH, KEY), "needs a readable proxy, --truth and --key"),
    ],
)
def test_needs_make_a_sentence(needs: tuple[Need[Any], ...], sentence: str) -> None:
    assert needed(*needs) == sentence


def test_a_check_without_its_input_is_not_run_and_says_what_it_needs() -> None:
    @check(RULE, once("job"), KEY, more=", to look inside")
    def looks(inputs: Inputs, group: Together, job: object) -> Iterator[Entry]:
        yield from RULE.checked("job", "looked inside")

    collector = ran(looks)
    assert collector.checks == [Check("FQ000", "job", "not-run", "needs --key, to look inside")]
    assert not collector.findings


def test_what_a_check_found_before_something_could_not_be_read_is_kept() -> None:
    @check(RULE, once("job"), problem="cannot be compared", failed="the model cannot be read")
    def breaks(inputs: Inputs, group: Together) -> Iterator[Entry]:
        yield from RULE.checked("job", "the first tensors were compared", [RULE.finding("job", "they leak")])
        raise FormatError("a tensor is cut off", where="/home/owner/model")

    collector = ran(breaks)
    assert [(done.status, done.why) for done in collector.checks] == [
        ("fail", "the first tensors were compared"),
        ("not-run", "the model cannot be read"),
    ]
    assert [(finding.rule, finding.scope, finding.message) for finding in collector.findings] == [
        ("FQ000", "job", "they leak"),
        ("FQ903", "job", "cannot be compared: a tensor is cut off"),  # and no path
    ]
