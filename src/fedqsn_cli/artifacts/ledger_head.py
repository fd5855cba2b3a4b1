"""The end of a ledger: a file beside it that says where each job's last release is, sealed under the job's key.

    ledger.jsonl.head   {"format": "fedqsn-ledger-head/1",
                         "jobs": {job: {"lines": n, "last": sha256 of line n, "seal": HMAC(key, ledger, n, sha256)}}}

The chain of a ledger shows a change between two of its lines; only a head shows that its end was cut off or changed.

Lines are written first, then the head. A kill in between leaves whole lines after the head: they count as releases, and
the next export seals them. A job's head is there before its first line, so that a ledger without one was never a kill.
Who can restore an old ledger together with its old head is not found out.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Protocol

from pydantic import Field

from fedqsn_cli import strictjson
from fedqsn_cli.artifacts.document import Count, Sha256, Strict
from fedqsn_cli.checkpoint import write_file_atomically
from fedqsn_cli.checkpoint.files import beside, read_file
from fedqsn_cli.errors import FormatError

_LARGEST = 16 << 20  # bytes; one job needs 300
_RESTORE = "restore it and its .head file from a backup"
_TRUST = (
    "restore its .head file from a backup; or, if nobody but you could write the ledger, run 'fedqsn export-proxy' "
    "once with --trust-records: it is then sealed as it is, and releases that were cut off before are never counted"
)


class Sealer(Protocol):
    """A job, as a head needs it: `JobKey`."""

    @property
    def commitment(self) -> str:
        """Names the job."""

    def seal(self, what: str, *fields: str) -> str:
        """An HMAC under the job's key."""


class End(Strict):
    """Where a ledger ended when a job last wrote to it: number and digest of its last line."""

    lines: Count
    last: Sha256
    seal: Sha256


class Head(Strict):
    """The document."""

    format: Literal["fedqsn-ledger-head/1"] = "fedqsn-ledger-head/1"
    jobs: Annotated[dict[Sha256, End], Field(min_length=1)]

    def ends_before(self, job: Sealer, digests: Sequence[str]) -> bool:
        """Are there lines of the ledger that the job has not sealed?"""
        return job.commitment not in self.jobs or self.jobs[job.commitment].lines < len(digests) - 1


def head_path(ledger: Path) -> Path:
    """The file beside a ledger. Raises InputError: the path is that of a directory."""
    return beside(ledger, f"{ledger.name}.head")


def read_head(ledger: Path) -> Head | None:
    """The head of a ledger; None if there is none. Raises FormatError."""
    path = head_path(ledger)
    if not path.exists():
        return None
    return Head.from_document(strictjson.loads(read_file(path, _LARGEST), path), path)


def write_head(ledger: Path, head: Head | None, job: Sealer, digests: Sequence[str]) -> None:
    """Seal the end of a ledger for a job; what the head says of other jobs stays.

    Args:
        head: the head until now. digests: of the ledger's beginning, and after each line.
    """
    lines, last = len(digests) - 1, digests[-1]
    end = End(lines=lines, last=last, seal=_seal(job, lines, last))
    jobs = {**(head.jobs if head is not None else {}), job.commitment: end}
    document = Head(jobs=jobs).model_dump(mode="json")
    write_file_atomically(head_path(ledger), strictjson.pretty(document).encode(), 0o600)


def check_end(ledger: Path, head: Head | None, jobs: Sequence[str], digests: Sequence[str], job: Sealer | None) -> None:
    """Refuse a ledger that does not reach to where its head says that it ends.

    Args:
        jobs: the job of each line. digests: of the ledger's beginning, and after each line.
        job: whose head must be there, and whose seal is verified. Without it lines are compared with a head that is
            there: that finds accidents, but not somebody who rewrites both.

    Raises:
        FormatError: lines are missing or were changed, or there is no head, or another key sealed it.
    """
    if job is not None and job.commitment in jobs and (head is None or job.commitment not in head.jobs):
        raise FormatError("the ledger has no head that tells where it ends", where=ledger, hint=_TRUST)
    for name, end in head.jobs.items() if head is not None else ():
        if end.lines >= len(digests):
            what = f"the ledger ends after line {len(digests) - 1}, but its head says that it has {end.lines} lines"
            raise FormatError(f"{what}: releases were removed", where=ledger, hint=_RESTORE)
        if digests[end.lines] != end.last:
            what = f"line {end.lines} of the ledger is not the one that its head names: it was changed"
            raise FormatError(what, where=ledger, hint=_RESTORE)
        if job is not None and name == job.commitment:
            _check_seal(ledger, end, job)


def _check_seal(ledger: Path, end: End, job: Sealer) -> None:
    if not hmac.compare_digest(end.seal, _seal(job, end.lines, end.last)):
        raise FormatError(
            "the head was not sealed with this job's key: it was changed", where=head_path(ledger), hint=_RESTORE
        )


def _seal(job: Sealer, lines: int, last: str) -> str:
    return job.seal("ledger", str(lines), last)
