"""FQ105: a tool that may choose the options of a release can send bits with them."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from fedqsn_cli import audit, export_proxy
from fedqsn_cli.artifacts.ledger import Release
from fedqsn_cli.artifacts.manifests import Quantization
from fedqsn_cli.auditing.completeness import Collector
from fedqsn_cli.auditing.gate import evaluate_policy
from fedqsn_cli.auditing.limits.measured import Measured
from fedqsn_cli.auditing.policy import Policy, Releases
from fedqsn_cli.auditing.policy_file import parse, template
from fedqsn_cli.errors import FormatError
from support.leaks import AuditedJob, make_job

SETTLED = Policy(release=Releases(settled=True))


def line(client: str = "alice", round: int = 1, p2: float = 0.1, **other: Any) -> Release:
    ids = dict.fromkeys(("proxy_id", "proxy_sha256", "plan", "job"), "0" * 64)
    usual: dict[str, Any] = {
        "schedule": "fresh", "p1": 0.1, "rescale": True, "fill": "zero", "quantization": None,
        "model_digest": "blake3:" + "0" * 64,
    }  # fmt: skip
    return Release(client=client, round=round, p2=p2, **ids, **usual | other)


def found(releases: list[Release], policy: Policy = SETTLED) -> list[str]:
    today = datetime.date(2026, 11, 26)
    findings, _ = evaluate_policy(policy, Measured(releases=releases), Collector(), today=today)
    return [one.message for one in findings if one.rule == "FQ105"]


def test_rounds_that_follow_each_other_with_the_same_options_are_settled() -> None:
    ledger = [line(client, round, p2) for round in (1, 2, 3) for client, p2 in (("alice", 0.1), ("bob", 0.125))]
    assert found([*ledger, line("carol", 3), line("owner", 3, 0.0), line("alice", 4)]) == []
    assert found([line(round=0), line(round=1)]) == []


@pytest.mark.parametrize(
    ("later", "what"),
    [
        (line(round=3), "its round is 3, and that of the job 1"),
        (line(round=2**53), f"its round is {2**53}, and that of the job 1"),
        (line(round=2, p2=0.1000000001), "its p2 is 0.1000000001, and was 0.1"),
        (line("bob", p2=0.1000000001), "its p2, 0.1000000001, has more than 3 decimals"),
        (line(p2=0.1), "it is a second proxy of one client in one round"),
        (line(round=2, schedule="sticky"), "its schedule is not that of the release before"),
        (line(round=2, rescale=False), "its rescale is not that of the release before"),
        (line(round=2, max_shard_bytes=1234567), "its max shard bytes is not that of the release before"),
        (
            line(round=2, quantization=Quantization(format="nf4", block_size=64, double_quant=False, layout="bnb")),
            "its quantization is not that of the release before",
        ),
    ],
)
def test_an_option_that_does_not_follow_is_found(later: Release, what: str) -> None:
    assert found([line(), later]) == [what]
    assert found([line(), later], Policy()) == []


def test_the_first_round_is_no_free_choice() -> None:
    assert found([line(round=2)]) == ["its round is 2, and that of the job 0"]


def test_clients_that_the_policy_does_not_list_are_found() -> None:
    policy = Policy(release=Releases(settled=True, clients=("alice",)))
    assert found([line(), line("x7Gq")], policy) == ["the policy does not list its client"]


def test_a_list_of_clients_alone_is_refused() -> None:
    with pytest.raises(FormatError, match=r"release.clients needs release.settled = true"):
        parse({"release": {"clients": ["alice"]}}, "policy.toml")


def test_a_round_number_that_carries_the_key_fails_the_generated_policy(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", clients=["alice"])
    (tmp_path / "policy.toml").write_text(template())
    secret = int.from_bytes(job.key.read_bytes()[:6], "big")
    owner = {"key": job.key, "ledger": job.ledger}
    export_proxy(job.truth, tmp_path / "bob", client="bob", round=secret, p2=0.2, **owner)
    assert [one.scope for one in _audit(job, tmp_path).findings if one.rule == "FQ105"] == [
        f"release bob round {secret}"
    ]
    assert "FQ105" in {rule for rule, _ in _missing(tmp_path)}


def _audit(job: AuditedJob, home: Path) -> Any:
    return audit(key=job.key, ledger=job.ledger, policy=home / "policy.toml")


def _missing(home: Path) -> set[tuple[str, str]]:
    """What is not checked where the key alone is given."""
    job = AuditedJob(home / "job", ("alice",))
    checked = audit([job.proxy()], key=job.key, policy=home / "policy.toml").checked
    return {(one.rule, one.status) for one in checked if one.status == "not-run"}
