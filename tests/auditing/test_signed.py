"""FQ013 and attestations: signatures hold nothing that is not explained, and verdicts travel signed."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedqsn_cli import audit, verify
from fedqsn_cli.artifacts.manifests import SIGNATURE
from fedqsn_cli.auditing.checks import run_checks
from fedqsn_cli.auditing.completeness import Collector
from fedqsn_cli.auditing.findings import Audit
from fedqsn_cli.auditing.inputs import open_inputs
from fedqsn_cli.auditing.rules import CHECKS
from fedqsn_cli.checkpoint import FILE_TIME
from fedqsn_cli.crypto import dsse
from fedqsn_cli.crypto.attestation import PREDICATE, folder_digest, read_attestation, read_passed
from fedqsn_cli.crypto.keys import load_signing_key, load_verify_key
from fedqsn_cli.crypto.signature import bundle_bytes
from fedqsn_cli.errors import FormatError, GateFailed, InputError, SignatureError
from fedqsn_cli.options import AuditOptions
from support.leaks import AuditedJob, make_job
from support.processes import run
from support.signing import digest_of, party

POLICY = '[scope]\nrequire = ["invariants"]\n'


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> AuditedJob:
    """Signed proxies of two clients, with a policy and the keys of the owner beside them."""
    home = tmp_path_factory.mktemp("signed") / "job"
    home.mkdir()
    owner = party(home, "owner")
    (home / "policy.toml").write_text(POLICY)
    return make_job(home, sign=owner.private)


@pytest.fixture
def job(signed: AuditedJob, tmp_path: Path) -> AuditedJob:
    shutil.copytree(signed.home, tmp_path / "job", copy_function=shutil.copy2)
    return AuditedJob(tmp_path / "job", signed.clients)


def everything(job: AuditedJob) -> dict[str, Any]:
    """All that the owner has."""
    policy = job.home / "policy.toml"
    return {"truth": job.truth, "key": job.key, "ledger": job.ledger, "policy": policy}


def audited(job: AuditedJob, **options: Any) -> Audit:
    """An audit of all proxies."""
    return audit([job.proxy(client) for client in job.clients], **everything(job) | options)


def checked(job: AuditedJob, **options: Any) -> Audit:
    """The hard invariants of alice's proxy alone: no attacks, which take their time."""
    collector = Collector()
    inputs = open_inputs([job.proxy()], collector, AuditOptions(**everything(job) | options))
    run_checks(CHECKS, inputs, collector)
    return Audit(tuple(collector.findings), tuple(collector.checks))


def status(found: Audit, rule: str = "FQ013") -> set[str]:
    return {check.status for check in found.checked if check.rule == rule}


def messages(found: Audit) -> list[str]:
    return [finding.message for finding in found.findings if finding.rule == "FQ013" and finding.severity == "hard"]


def resign(job: AuditedJob) -> None:
    """Sign alice's proxy again, with a random number instead of the one of RFC 6979."""
    path, key = job.proxy() / SIGNATURE, load_signing_key(job.home / "owner.key")
    told = base64.b64decode(json.loads(path.read_bytes())["dsseEnvelope"]["payload"])
    made = key.sign(dsse.pre_authentication(told), ec.ECDSA(hashes.SHA256()))
    status = path.stat()
    path.write_bytes(bundle_bytes(told, made, key.public_key()))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_signed_proxies_pass_and_nothing_else_changes(signed: AuditedJob) -> None:
    found = checked(signed, verify_key=signed.home / "owner.pub")
    assert (found.verdict, status(found), status(found, "FQ012"), status(found, "FQ010")) == (
        "passed", {"pass"}, {"pass"}, {"pass"},
    )  # fmt: skip
    notes = [finding for finding in found.findings if finding.rule == "FQ013"]
    assert {note.severity for note in notes} == {"info"} and "32 bytes" in notes[0].message
    assert not any(f.rule == "FQ013" for f in checked(signed, sign=signed.home / "owner.key").findings)


def test_a_signature_that_nobody_verified_leaves_the_audit_incomplete(signed: AuditedJob) -> None:
    assert status(checked(signed)) == {"not-run"}
    assert audited(signed).exit_code == 3


def test_an_unsigned_proxy_passes_unless_a_signature_is_asked_for(job: AuditedJob) -> None:
    for client in job.clients:
        (job.proxy(client) / SIGNATURE).unlink()
        os.utime(job.proxy(client), (FILE_TIME, FILE_TIME))
    assert checked(job).verdict == "passed"
    found = checked(job, verify_key=job.home / "owner.pub")
    assert found.exit_code == 4 and "is not signed" in messages(found)[0]


def test_the_signature_of_somebody_else_is_found(job: AuditedJob) -> None:
    eve = party(job.home, "eve")
    found = checked(job, verify_key=eve.public)
    assert found.exit_code == 4 and "was signed with another key" in messages(found)[0]


def test_words_in_a_signature_are_found(job: AuditedJob) -> None:
    path = job.proxy() / SIGNATURE
    document = json.loads(path.read_bytes())
    path.write_text(json.dumps(document | {"note": "weights"}))
    found = checked(job, verify_key=job.home / "owner.pub")
    assert found.exit_code == 4 and "not the one that an export writes" in messages(found)[0]


def test_a_number_that_was_chosen_is_found_with_the_private_key(job: AuditedJob) -> None:
    resign(job)
    assert checked(job, verify_key=job.home / "owner.pub").verdict == "passed"
    found = checked(job, sign=job.home / "owner.key")
    assert found.exit_code == 4 and "not the one that an export writes" in messages(found)[0]


# ------------------------------------------------------------------------------------------------ attestations


def attested(job: AuditedJob, **options: Any) -> tuple[Audit, Path]:
    path = job.home / "audit.intoto.json"
    return audited(job, sign=job.home / "owner.key", attest=path, **options), path


def test_a_verdict_travels_with_the_digests_of_the_proxies_and_without_any_name(signed: AuditedJob) -> None:
    found, path = attested(signed)
    key = load_verify_key(signed.home / "owner.pub")
    told = read_attestation(path, key)
    assert (told.result, told.verdict, found.verdict) == ("PASSED", "passed", "passed")
    assert told.policy == hashlib.sha256(POLICY.encode()).hexdigest()
    assert "FQ012" in told.passed and not told.failed
    text = base64.b64decode(json.loads(path.read_bytes())["payload"]).decode()
    assert not any(word in text for word in ("alice", "bob", str(signed.home), "policy.toml"))
    passed = read_passed(path, key, signed.home / "policy.toml")
    for name in signed.clients:
        passed.require(digest_of(signed.proxy(name)), name)
    assert verify(path, key=signed.home / "owner.pub").verdict == "passed"


def test_the_digest_of_a_folder_is_that_of_sha256sum(signed: AuditedJob) -> None:
    shell = "LC_ALL=C; export LC_ALL; sha256sum * | sha256sum"
    done = subprocess.run(shell, shell=True, cwd=signed.proxy(), capture_output=True, text=True, check=True)
    _, path = attested(signed)
    told = read_attestation(path, load_verify_key(signed.home / "owner.pub"))
    assert done.stdout.split()[0] in told.proxies.values()
    assert folder_digest({}) == hashlib.sha256(b"").hexdigest()


def test_a_folder_that_was_changed_or_never_audited_is_refused(job: AuditedJob) -> None:
    _, path = attested(job)
    key = load_verify_key(job.home / "owner.pub")
    (job.proxy() / "notes.txt").write_text("weights")
    with pytest.raises(SignatureError, match="not one of the folders that were audited"):
        read_passed(path, key).require(digest_of(job.proxy()), "alice")
    with pytest.raises(SignatureError, match="not one of the folders"):
        read_passed(path, key).require(digest_of(job.truth), "model")
    (job.home / "policy.toml").write_text(POLICY + "# changed\n")
    with pytest.raises(InputError, match="another policy"):
        read_passed(path, key, job.home / "policy.toml")


def test_an_audit_that_did_not_pass_is_refused(job: AuditedJob) -> None:
    (job.proxy() / "notes.txt").write_text("weights")
    found, path = attested(job)
    assert found.exit_code == 4
    key = load_verify_key(job.home / "owner.pub")
    with pytest.raises(GateFailed, match=r"did not pass \(broken\)"):
        read_passed(path, key)
    assert "FQ010" in read_attestation(path, key).failed


def test_a_forged_attestation_is_refused(job: AuditedJob) -> None:
    _, path = attested(job)
    key, eve = load_verify_key(job.home / "owner.pub"), party(job.home, "eve")
    with pytest.raises(SignatureError, match="another key"):
        read_attestation(path, load_verify_key(eve.public))
    document = json.loads(path.read_bytes())
    other = base64.b64decode(document["payload"]).replace(b"PASSED", b"passed")
    path.write_text(json.dumps(document | {"payload": base64.b64encode(other).decode()}))
    with pytest.raises(SignatureError, match="false"):
        read_attestation(path, key)
    private = load_signing_key(job.home / "owner.key")
    for predicate in ({}, {"result": "PASSED", "configuration": []}):
        payload = dsse.statement([], PREDICATE, predicate)
        path.write_text(json.dumps(dsse.envelope(payload, dsse.sign(payload, private))))
        with pytest.raises(FormatError, match="field predicate"):
            read_attestation(path, key)


def test_a_signature_of_files_is_no_attestation(job: AuditedJob) -> None:
    envelope = json.loads((job.proxy() / SIGNATURE).read_bytes())["dsseEnvelope"]
    path = job.home / "false.json"
    path.write_text(json.dumps(envelope))
    with pytest.raises(FormatError, match="the signed statement is no"):
        read_attestation(path, load_verify_key(job.home / "owner.pub"))


def test_what_an_attestation_needs_is_asked_for(job: AuditedJob) -> None:
    with pytest.raises(InputError, match="--attest: needs --sign"):
        audited(job, attest=job.home / "a")
    with pytest.raises(InputError, match="--attest: needs --policy"):
        audited(job, attest=job.home / "a", sign=job.home / "owner.key", policy=None)
    with pytest.raises(InputError, match="no proxy to attest"):
        audit(
            ledger=job.ledger, key=job.key, policy=job.home / "policy.toml", attest=job.home / "a",
            sign=job.home / "owner.key",
        )  # fmt: skip


def test_the_commands_do_what_the_functions_do(job: AuditedJob) -> None:
    made = run(
        "audit", job.proxy("alice"), job.proxy("bob"), "--truth", job.truth, "--key", job.key, "--ledger",
        job.ledger, "--policy", job.home / "policy.toml", "--sign", job.home / "owner.key", "--attest",
        job.home / "a.json", "-q",
    )  # fmt: skip
    assert (made.code, made.out) == (0, "passed\n")
    shown = run("verify", job.home / "a.json", "--key", job.home / "owner.pub")
    assert shown.code == 0 and "passed" in shown.out and "proxy 2" in shown.out
    shown = run("verify", job.proxy(), "--key", job.home / "owner.pub")
    assert shown.code == 0 and "model.safetensors" in shown.out
