"""A signed verdict of an audit: an in-toto statement of the predicate test-result, in an envelope (`dsse`).

    subject        one for each proxy, "proxy 1" and so on, in the order of their digests: no client, no path
    result         PASSED, or FAILED for every other verdict
    configuration  the policy with its digest, and the tool with its version and its word for the verdict
    passedTests, failedTests   ids of the rules that were applied; what could not be checked is in neither

The digest of a proxy is that of its whole folder: SHA-256 of what `LC_ALL=C sha256sum *` prints in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from fedqsn_cli import strictjson
from fedqsn_cli.artifacts.document import Sha256, ShortText, Strict
from fedqsn_cli.artifacts.manifests import file_digest
from fedqsn_cli.checkpoint.files import read_file
from fedqsn_cli.crypto import dsse
from fedqsn_cli.crypto.keys import SigningKey, VerifyKey
from fedqsn_cli.errors import GateFailed, InputError, SignatureError
from fedqsn_cli.version import VERSION

PREDICATE = "https://in-toto.io/attestation/test-result/v0.1"


@dataclass(frozen=True, slots=True)
class Attestation:
    """What an attestation says.

    Args:
        result: PASSED or FAILED. verdict: the same as the tool words it. tool: name and version.
        policy: SHA-256 of the policy file. proxies: digests of their folders.
        passed, failed: rules.
    """

    result: str
    verdict: str
    tool: str
    policy: str
    proxies: Mapping[str, str]
    passed: Sequence[str]
    failed: Sequence[str]

    def require(self, digest: str, where: object) -> None:
        """Check that a folder with this digest (`folder_digest`) was audited. Raises SignatureError."""
        if digest not in self.proxies.values():
            hint = "it was changed since, or is another proxy: audit it"
            raise SignatureError("is not one of the folders that were audited", where=where, hint=hint)


def attestation_bytes(told: Attestation, key: SigningKey) -> bytes:
    """The text of an attestation file. The names of `told.proxies` are not in it."""
    subjects = [
        {"name": f"proxy {number}", "digest": {"sha256": digest}}
        for number, digest in enumerate(sorted(told.proxies.values()), start=1)
    ]
    tool = {"name": "fedqsn", "annotations": {"version": VERSION, "verdict": told.verdict}}
    predicate = {
        "result": told.result,
        "configuration": [{"name": "policy", "digest": {"sha256": told.policy}}, tool],
        "passedTests": sorted(told.passed),
        "failedTests": sorted(told.failed),
    }
    payload = dsse.statement(subjects, PREDICATE, predicate)
    return strictjson.dumps(dsse.envelope(payload, dsse.sign(payload, key))).encode() + b"\n"


def read_attestation(path: Path, key: VerifyKey) -> Attestation:
    """What an attestation says, verified.

    Raises:
        InputError: there is no such file. SignatureError: it was not signed with the key. FormatError: it is malformed.
    """
    document = strictjson.loads(read_file(path, dsse.LARGEST), path)
    told, _ = dsse.opened(document, key, PREDICATE, path)
    return _Statement.from_document({"subject": told.get("subject"), "predicate": told.get("predicate")}, path).told()


class _Sha256(Strict):
    sha256: Sha256


class _Subject(Strict):
    name: ShortText
    digest: _Sha256


class _Policy(Strict):
    name: Literal["policy"]
    digest: _Sha256


class _Annotations(Strict):
    version: ShortText
    verdict: ShortText


class _Tool(Strict):
    name: ShortText
    annotations: _Annotations


class _Predicate(Strict):
    result: Literal["PASSED", "FAILED"]
    configuration: tuple[_Policy, _Tool] = Field(strict=False)
    passedTests: list[ShortText]
    failedTests: list[ShortText]


class _Statement(Strict):
    """What `attestation_bytes` signs: whoever signed it, each part has its type."""

    subject: list[_Subject] = Field(min_length=1)
    predicate: _Predicate

    def told(self) -> Attestation:
        policy, tool = self.predicate.configuration
        return Attestation(
            result=self.predicate.result,
            verdict=tool.annotations.verdict,
            tool=f"{tool.name} {tool.annotations.version}",
            policy=policy.digest.sha256,
            proxies={one.name: one.digest.sha256 for one in self.subject},
            passed=self.predicate.passedTests,
            failed=self.predicate.failedTests,
        )


def read_passed(path: Path, key: VerifyKey, policy: str | Path | None = None) -> Attestation:
    """The attestation of an audit that passed.

    Args:
        policy: the file that it must have been held against; None for any.

    Raises:
        SignatureError: it was not signed with the key. GateFailed: the audit did not pass.
        InputError: there is no attestation, or it is of another policy.
    """
    told = read_attestation(path, key)
    if told.result != "PASSED":
        raise GateFailed(f"the audit did not pass ({told.verdict})", where=path, hint="do not send these proxies")
    if policy is not None and told.policy != file_digest(Path(policy)):
        raise InputError("the audit was held against another policy", where=path, hint=f"audit with {policy}")
    return told


def folder_digest(digests: Mapping[str, str]) -> str:
    """SHA-256 of a folder: of its files' digests and names, as sha256sum prints them."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
