"""The verdict of an audit as a signed attestation, which travels where a report would tell too much."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from fedqsn_cli.artifacts.manifests import file_digest
from fedqsn_cli.auditing.digests import digests_of
from fedqsn_cli.auditing.findings import Audit, Status
from fedqsn_cli.auditing.inputs import Inputs
from fedqsn_cli.checkpoint import write_file_atomically
from fedqsn_cli.crypto.attestation import Attestation, attestation_bytes, folder_digest
from fedqsn_cli.crypto.keys import SigningKey
from fedqsn_cli.version import VERSION

_STATUSES = get_args(Status)


def write_attestation(path: Path, audit: Audit, inputs: Inputs, key: SigningKey) -> None:
    """Write the verdict, whatever it is; the digests are those of the bytes that the audit read.

    Args:
        path: the file, which is replaced.

    Raises:
        InputError: it cannot be written.
    """
    ended = {status: {check.rule for check in audit.checked if check.status == status} for status in _STATUSES}
    failed = ended["fail"] | {finding.rule for finding in audit.findings if finding.severity != "info"}
    told = Attestation(
        result="PASSED" if audit.verdict == "passed" else "FAILED",
        verdict=audit.verdict,
        tool=f"fedqsn {VERSION}",
        policy=file_digest(Path(str(inputs.options.policy))),
        proxies={folder.scope: folder_digest(digests_of(inputs, folder)) for folder in inputs.folders},
        passed=sorted(ended["pass"] - ended["not-run"] - failed),
        failed=sorted(failed),
    )
    write_file_atomically(path, attestation_bytes(told, key))
