"""`audit --outbox DIR --round N`: the proxies of a round are found by the ledger."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fedqsn_cli import audit, export_proxy
from fedqsn_cli.auditing import digests
from fedqsn_cli.errors import InputError
from support.leaks import AuditedJob, make_job


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> AuditedJob:
    """Two clients, two rounds: the second one in a folder of its own."""
    job = make_job(tmp_path_factory.mktemp("outbox") / "job")
    export_proxy(
        job.truth,
        job.home / "outbox" / "{client}-2",
        client=job.clients,
        round=2,
        p1=0.3,
        p2=0.2,
        key=job.key,
        ledger=job.ledger,
        schedule="sticky",
    )
    for client in job.clients:
        shutil.copytree(job.proxy(client), job.home / "outbox" / f"{client}-1")
    return job


def scopes(job: AuditedJob, number: int, outbox: Path | None = None) -> tuple[set[str], list[str]]:
    """Proxies that were audited, and messages of what is incomplete."""
    result = audit(
        outbox=outbox or job.home / "outbox",
        round=number,
        truth=job.truth,
        key=job.key,
        ledger=job.ledger,
    )
    proxies = {name for name in result.inputs if name.startswith("proxy ")}
    return proxies, [one.message for one in result.findings if one.severity == "incomplete"]


@pytest.mark.parametrize("number", [1, 2])
def test_exactly_the_proxies_of_the_round_are_audited(job: AuditedJob, number: int) -> None:
    assert scopes(job, number) == ({f"proxy {client}-{number}" for client in job.clients}, [])


def test_a_missing_proxy_makes_the_audit_incomplete(job: AuditedJob, tmp_path: Path) -> None:
    shutil.copytree(job.home / "outbox" / "alice-1", tmp_path / "outbox" / "alice")
    found, problems = scopes(job, 1, tmp_path / "outbox")
    assert found == {"proxy alice"}
    assert problems == ["the proxy of client bob is not in the outbox"]


def test_whatever_else_lies_in_the_outbox_is_audited_too(job: AuditedJob, tmp_path: Path) -> None:
    shutil.copytree(job.home / "outbox", tmp_path / "outbox")
    shutil.copytree(job.truth, tmp_path / "outbox" / "mistake")
    _, problems = scopes(job, 1, tmp_path / "outbox")
    assert "the proxy cannot be read: no proxy.json here" in problems


@pytest.mark.parametrize("folder", ["/", "/proc", "/dev"])
def test_a_folder_of_anything_else_is_refused_before_it_is_read(folder: str, job: AuditedJob) -> None:
    with pytest.raises(InputError, match=r"none of the \d+ folders in it is a proxy"):
        audit(outbox=folder, round=1, ledger=job.ledger)


def test_a_disk_is_no_proxy(job: AuditedJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # patched: the real one needs ten thousand files
    monkeypatch.setattr(digests, "_MOST_ENTRIES", 30)
    outbox = Path(shutil.copytree(job.home / "outbox", tmp_path / "outbox"))
    home = outbox / "home"
    for number in range(31):
        (home / "deep" / str(number)).mkdir(parents=True)
    (outbox / "alice-1" / "loop").symlink_to(".")  # is not followed
    _, problems = scopes(job, 1, outbox)
    assert "holds more than 30 files and folders" in problems


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"round": 1}, "belong together"),
        ({"outbox": "."}, "belong together"),
        ({"outbox": ".", "round": 1}, "is in the ledger"),
        ({"outbox": "nowhere", "round": 1, "ledger": True}, "no such folder"),
        ({"outbox": ".", "round": 7, "ledger": True}, "no release of round 7"),
        ({"outbox": ".", "round": 1, "ledger": True, "proxies": ["a"]}, "proxies were named"),
    ],
)
def test_what_does_not_fit_together_is_refused(job: AuditedJob, options: dict[str, object], what: str) -> None:
    given = dict(options)
    if given.pop("ledger", False):
        given["ledger"] = job.ledger
    with pytest.raises(InputError, match=what):
        audit(given.pop("proxies", None), **given)  # type: ignore[arg-type]
