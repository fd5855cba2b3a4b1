"""policy.toml: everything optional, nothing unknown, every error with its place."""

from __future__ import annotations

import datetime
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedqsn_cli.auditing.policy import Limits, Policy
from fedqsn_cli.auditing.policy_file import load, parse, summary, template, without_file
from fedqsn_cli.auditing.rules import SCOPES, required
from fedqsn_cli.errors import FormatError, InputError

WAIVER = {
    "rule": "FQ203",
    "tensor": "*embed*",
    "reason": "public",
    "owner": "me@example.com",
    "expires": datetime.date(2027, 1, 31),
}


def test_the_template_is_a_policy_that_limits_something(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(template())
    policy = load(tmp_path / "policy.toml")
    limits = policy.limits
    assert limits.proxy.rho is not None and policy.budget.client is not None and limits.clear.share is not None
    assert required(policy) >= {"FQ001", "FQ012", "FQ101", "FQ201", "FQ204", "FQ301", "FQ302"}
    assert len(str(policy.digest)) == 64


def test_every_commented_line_of_the_template_is_valid_too() -> None:
    lines = [line for line in template().splitlines() if not line.startswith("#   ")]
    wanted = [line for line in lines if not line.startswith("# ") or line.startswith("# [") or " = " in line]
    code = [line.removeprefix("# ") for line in wanted]
    policy = parse(tomllib.loads("\n".join(code)), "here")
    assert (policy.threat.rounds, policy.threat.public_examples) == (10, (100, 1000))
    assert policy.limits.proxy.rho is not None and policy.limits.tensor.delta_recovered is not None and policy.waiver


def test_an_empty_policy_limits_and_requires_nothing() -> None:
    assert parse({}, "here") == Policy()
    assert required(Policy()) == frozenset()


def test_a_limit_makes_its_rule_required() -> None:
    policy = parse({"limits": {"proxy": {"rho": 0.9}, "coalition": {"delta_recovered": 0.5}}}, "here")
    assert required(policy) == {"FQ301", "FQ204"}


def test_scopes_and_single_rules_can_be_required() -> None:
    policy = parse({"scope": {"require": ["invariants", "FQ204"]}}, "here")
    assert required(policy) == {*SCOPES["invariants"], "FQ204"}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"limit": {}}, "here: limit is not part of a policy; did you mean limits?"),
        (
            {"limits": {"proxy": {"cosin": 0.9}}},
            "here: limits.proxy.cosin is not part of a policy; did you mean cosine?",
        ),
        ({"limits": {"proxy": {"exact_share": 5}}}, "limits.proxy.exact_share must be a number from 0 to 1, not 5"),
        ({"limits": {"proxy": {"cosine": float("nan")}}}, "limits.proxy.cosine must be a number from -1 to 1, not nan"),
        ({"limits": {"proxy": {"cosine": True}}}, "limits.proxy.cosine must be a number from -1 to 1, not True"),
        ({"limits": {"proxy": {"rho": float("inf")}}}, "limits.proxy.rho must be a finite number"),
        ({"limits": {"tensor": {"rho": 0.5}}}, "limits.tensor.rho is not part of a policy"),
        (
            {"threat": {"public_base": True}, "limits": {"coalition": {"cosine": 0.9}}},
            "limits.coalition.cosine limits nothing with threat.public_base = true",
        ),
        (
            {"threat": {"public_base": False}, "limits": {"proxy": {"gain": 0.9}}},
            "limits.proxy.gain needs a public base, but threat.public_base is false",
        ),
        ({"threat": {"public_base": 1}}, "threat.public_base "),
        ({"limits": 3}, "limits must be a table, written [limits]"),
        ({"budget": {"client": "0.9"}}, "budget.client must be a number from 0 to 1, not '0.9'"),
        ({"threat": {"colluders": 0}}, "threat.colluders must be a whole number, 1 or more, not 0"),
        ({"threat": {"colluders": 2.0}}, "threat.colluders must be a whole number"),
        ({"threat": {"public_examples": [0]}}, "threat.public_examples must be a list of positive whole numbers"),
        ({"scope": {"require": "recovery"}}, "scope.require must be a list of texts"),
        ({"scope": {"require": ["recovry"]}}, "'recovry' is neither a scope nor a rule; did you mean recovery?"),
        ({"regression": {"cosine": -1}}, "regression.cosine must be a number of 0 or more, not -1"),
        ({"waiver": {}}, "waiver must be a list of tables, each written [[waiver]]"),
        (
            {"waiver": [WAIVER | {"rule": "FQ001"}]},
            "waiver 1.rule FQ001 cannot be waived: it is about a hard invariant",
        ),
        ({"waiver": [WAIVER | {"rule": "FQ901"}]}, "FQ901 cannot be waived: it is about an audit that is not complete"),
        ({"waiver": [WAIVER | {"rule": "FQ23"}]}, "'FQ23' is not a rule"),
        (
            {"waiver": [WAIVER, WAIVER | {"expires": "2027-01-31"}]},
            "waiver 2.expires must be a date such as 2027-01-31",
        ),
        ({"waiver": [WAIVER | {"expires": datetime.datetime(2027, 1, 31)}]}, "waiver 1.expires must be a date"),
        ({"waiver": [WAIVER | {"until": 1}]}, "waiver 1.until is not part of a policy"),
    ],
)
def test_what_cannot_be_is_refused_with_its_place(document: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse(document, "here")
    assert message in str(caught.value)


@pytest.mark.parametrize("field", ["rule", "reason", "owner", "expires"])
def test_a_waiver_needs_rule_reason_owner_and_date(field: str) -> None:
    with pytest.raises(FormatError, match=f"waiver 1.{field}"):
        parse({"waiver": [{key: value for key, value in WAIVER.items() if key != field}]}, "here")


def test_a_public_base_that_the_policy_tells_of_must_be_given() -> None:
    assert required(parse({"threat": {"public_base": True}}, "here")) == {"FQ204"}
    assert required(parse({"threat": {"public_base": False}}, "here")) == frozenset()


def test_a_missing_or_broken_file_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--init-policy"):
        load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_bytes(b"[limits\xff")
    with pytest.raises(FormatError, match="not valid TOML"):
        load(tmp_path / "bad.toml")


def test_without_a_policy_invariants_and_recovery_must_still_have_been_checked() -> None:
    assert required(without_file(proxies=True, ledger=False)) >= {"FQ001", "FQ005", "FQ201"}
    assert required(without_file(proxies=False, ledger=True)) == {"FQ101", "FQ102", "FQ103", "FQ105"}


def test_a_summary_holds_everything_that_decided() -> None:
    policy = parse({"limits": {"proxy": {"cosine": 0.9}}, "waiver": [WAIVER]}, "here")
    document = summary(policy)
    assert document["limits"]["proxy"] == {"cosine": 0.9}
    assert document["waivers"][0]["expires"] == "2027-01-31"
    assert policy.limits.proxy == Limits(cosine=0.9)
