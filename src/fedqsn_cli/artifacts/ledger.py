"""The server's append-only record of every proxy it released, and of every merge with noise.

One JSON line each. Each line holds the SHA-256 of the line before it, and a head beside the ledger seals where it
ends (`ledger_head`), so that a line that was changed, removed or moved is detected. A release is recorded *before* its
proxy appears: there is no proxy without a line.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from fedqsn_cli import strictjson, validate
from fedqsn_cli.artifacts.document import Count, Digest, PositiveNumber, Ratio, ServerRatio, Sha256, Strict
from fedqsn_cli.artifacts.ledger_head import Sealer, check_end, head_path, read_head, write_head
from fedqsn_cli.artifacts.manifests import Fill, Quantization, TrainsFill
from fedqsn_cli.checkpoint.files import open_regular_file
from fedqsn_cli.errors import FormatError, InputError

_NO_LINE = "0" * 64
_BEGINS = b'{"client'  # every line
_LARGEST = 1 << 30  # bytes, a million releases
_BLOCK = 1 << 22  # bytes
_SAME_IN_A_JOB = ("p1", "p1_least", "plan")
_SHARED = frozenset({"client", "format", "job", "model_digest", "plan", "quantization"})  # alike in many lines
ClientId = Annotated[str, Field(pattern=f"^{validate.CLIENT_ID}$")]


class Release(Strict):
    """One released proxy."""

    format: Literal["fedqsn-ledger/1", "fedqsn-ledger/2"] = "fedqsn-ledger/2"  # 1: before digests by BLAKE3
    client: ClientId
    round: Count
    schedule: Literal["fresh", "sticky"]
    proxy_id: Sha256
    proxy_sha256: Sha256  # of proxy.json, which holds the sha256 of every other file
    p1: ServerRatio
    p1_least: Ratio | None = None  # of any group, where some have their own ratio; not written otherwise
    p2: Ratio
    rescale: bool
    fill: Fill
    train: TrainsFill = None
    max_shard_bytes: Count | None = None  # where it is not the usual one: an audit makes the same files again
    quantization: Quantization | None
    plan: Sha256
    model_digest: Digest
    job: Sha256
    previous: Sha256 = _NO_LINE

    def same_as(self, other: Release) -> bool:
        """Whether both are the same release, wherever in the ledger it is and whichever version wrote the line."""
        return self == other.model_copy(update={"format": self.format, "previous": self.previous})


class PrivateMerge(Strict):
    """One merge with central differential privacy: what an accountant needs of it.

    Args:
        merge_id: HMAC of everything that the noise depends on: the same merge, made again, has the same noise.
        model_digest: of the model before. clients: how many updates were merged.
    """

    format: Literal["fedqsn-private-merge/1", "fedqsn-private-merge/2"] = "fedqsn-private-merge/2"
    merge_id: Sha256
    job: Sha256
    round: Count
    model_digest: Digest
    clients: Count
    clip_norm: PositiveNumber
    noise_multiplier: PositiveNumber
    previous: Sha256 = _NO_LINE


Entry = Release | PrivateMerge


def read(path: Path, job: Sealer | None = None) -> list[Release]:
    """All releases in order; checks the chain of lines, and that it ends where the head says.

    Args:
        job: verifies the seal of the head; see `ledger_head.check_end`.

    Raises:
        InputError: there is no such file. FormatError: a line is malformed, the chain is broken, or lines are missing.
    """
    return _read(path, job).releases


def read_merges(path: Path, job: Sealer) -> list[PrivateMerge]:
    """All merges with noise of a job, in order. Raises as `read`."""
    return _read(path, job).merges_of(job)


def _read(path: Path, job: Sealer | None) -> _Lines:
    if not path.exists():
        if head_path(path).exists():
            raise InputError("the ledger is gone, but its head is here", where=path, hint="restore it from a backup")
        raise InputError("no ledger here", where=path, hint="it is written by 'fedqsn export-proxy --ledger'")
    with open(open_regular_file(path), "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # line and head are written under the lock of the ledger
        lines = _Lines.parse(_read_all(file.fileno(), path), path)
        check_end(path, read_head(path), lines.jobs, lines.digests, job)
    return lines


def read_if_there(path: Path, job: Sealer | None = None) -> list[Release]:
    """As `read`; none where the ledger does not exist yet.

    Raises:
        InputError: it is not a regular file, or is gone. FormatError: see `read`.
    """
    return read(path, job) if path.exists() or head_path(path).exists() else []


def record(
    path: Path,
    job: Sealer,
    releases: Sequence[Release],
    *,
    check: Callable[[Sequence[Release]], None] | None = None,
    trust: bool = False,
) -> None:
    """Append releases, flush them to disk and seal the end; a release that the ledger has is not written again.

    Args:
        job: the releases' job.
        check: called with all earlier releases, under the ledger's lock. If it raises, nothing is recorded.
        trust: where the ledger has no head for the job, seal it as it is.

    Raises:
        FormatError: the ledger is damaged. InputError: the ledger has other content for the proxy id of a release, or
            another p1 or plan for its job.
    """

    def new(known: _Lines) -> list[Release]:
        if check is not None:
            check(known.releases)
        return list(_unknown(known.releases, releases, path))

    _record(path, job, new, trust=trust)


def record_merge(
    path: Path, job: Sealer, merge: PrivateMerge, *, check: Callable[[Sequence[PrivateMerge]], None]
) -> None:
    """Append a merge with noise, flush it to disk and seal the end; one that the ledger has is not written again.

    Args:
        check: called with all merges of the job, this one included, under the ledger's lock; as for `record`.

    Raises:
        FormatError: the ledger is damaged.
    """

    def new(known: _Lines) -> list[PrivateMerge]:
        before = known.merges_of(job)
        added = [] if any(each.merge_id == merge.merge_id for each in before) else [merge]
        check([*before, *added])
        return added

    _record(path, job, new, trust=False)


def _record(path: Path, job: Sealer, choose: Callable[[_Lines], Sequence[Entry]], *, trust: bool) -> None:
    """Append the lines that `choose` gives, and seal the end; nothing is written where it raises."""
    with _locked(path) as descriptor:
        known = _Lines.parse(_read_all(descriptor, path), path)
        head = read_head(path)
        if trust and (head is None or job.commitment not in head.jobs):
            write_head(path, head, job, known.digests)
            head = read_head(path)
        check_end(path, head, known.jobs, known.digests, job)
        new = choose(known)
        if head is None or job.commitment not in head.jobs:
            write_head(path, head, job, known.digests)  # before the first line: see `ledger_head`
        lines, digests = _chained(new, known.digests)
        if lines:
            _append(descriptor, known.size, b"\n" * known.open_end + lines)
        if lines or head is None or head.ends_before(job, digests):
            write_head(path, read_head(path), job, digests)


def _chained(entries: Sequence[Entry], digests: Sequence[str]) -> tuple[bytes, list[str]]:
    """The lines of new entries, and the digests of the ledger with them."""
    lines, digests = [], list(digests)
    for entry in entries:
        linked = entry.model_copy(update={"previous": digests[-1]})
        line = strictjson.dumps(linked.model_dump(mode="json")).encode()
        digests.append(hashlib.sha256(line).hexdigest())
        lines.append(line + b"\n")
    return b"".join(lines), digests


def _unknown(known: Sequence[Release], releases: Sequence[Release], path: Path) -> Iterator[Release]:
    by_id = {release.proxy_id: release for release in known}
    jobs = {release.job: release for release in known}
    for release in releases:
        before = jobs.get(release.job, release)
        if any(getattr(before, name) != getattr(release, name) for name in _SAME_IN_A_JOB):
            raise InputError(
                f"the ledger has releases of this job with p1 = {before.p1!r} and plan {before.plan[:12]}, not "
                f"p1 = {release.p1!r} and plan {release.plan[:12]}",
                where=path,
                hint="together they would show what each of them hides; start a new job with a new key",
            )
        old = by_id.get(release.proxy_id)
        if old is None:
            yield release
        elif not old.same_as(release):
            raise InputError(
                f"proxy {release.proxy_id[:12]} for client {release.client!r} was released before with other content",
                where=path,
                hint=_other_content(old, release),
            )


def _other_content(old: Release, new: Release) -> str:
    """What differs between two releases with one proxy id, and what to do about it."""
    if old.max_shard_bytes == new.max_shard_bytes:
        return "files next to the model (tokenizer, config) changed since; use a new --round"
    usual = "without --max-shard-size"
    size = f"with --max-shard-size {old.max_shard_bytes}" if old.max_shard_bytes is not None else usual
    return f"that was {size}: do the same now, or use a new --round"


def _append(descriptor: int, size: int, lines: bytes) -> None:
    try:
        written = 0
        while written < len(lines):
            written += os.pwrite(descriptor, lines[written:], size + written)
        os.ftruncate(descriptor, size + len(lines))
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, size)
        raise


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _read_all(descriptor: int, path: Path) -> bytes:
    """All bytes of an open ledger. Raises InputError, FormatError: not a plain file, or larger than any ledger."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise InputError("not a regular file", where=path)
    if found.st_size > _LARGEST:
        raise FormatError(f"larger than {_LARGEST} bytes, which no ledger needs", where=path)
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        return file.read()


@dataclass(frozen=True, slots=True)
class _Lines:
    """A ledger that was read.

    Args:
        digests: of its beginning, and SHA-256 of each line. size: bytes of its whole lines.
        open_end: is the last of them without its line feed?
    """

    entries: list[Entry]
    digests: list[str]
    size: int
    open_end: bool

    @property
    def jobs(self) -> list[str]:
        return [entry.job for entry in self.entries]

    @property
    def releases(self) -> list[Release]:
        return [entry for entry in self.entries if isinstance(entry, Release)]

    def merges_of(self, job: Sealer) -> list[PrivateMerge]:
        merges = [entry for entry in self.entries if isinstance(entry, PrivateMerge)]
        return [entry for entry in merges if entry.job == job.commitment]

    @classmethod
    def parse(cls, data: bytes, path: Path) -> _Lines:
        """Check every line and the chain. Raises FormatError."""
        size = _whole(data, path)
        entries: list[Entry] = []
        digests = [_NO_LINE]
        known: dict[object, Any] = {}
        for number, line in enumerate(_lines(data, size), start=1):
            where = f"{path}:{number}"
            entry = _entry(strictjson.loads(line, where), where)
            if entry.previous != digests[-1]:
                raise FormatError(
                    "the chain of the ledger is broken here", where=where, hint="restore it from a backup"
                )
            _share(entry, digests[-1], known)
            entries.append(entry)
            digests.append(hashlib.sha256(line).hexdigest())
        return cls(entries, digests, size, data[size - 1 : size] not in (b"\n", b""))


def _lines(data: bytes, size: int, block: int = _BLOCK) -> Iterator[bytes]:
    """The lines of the first `size` bytes, of which about `block` are copied at a time."""
    start = 0
    while start < size:
        stop = data.rfind(b"\n", start, min(start + block, size)) + 1 or size
        yield from data[start:stop].splitlines()
        start = stop


def _share(entry: Entry, previous: str, known: dict[object, Any]) -> None:
    """Let a new entry have one object in common with others for what is equal in them: half of the memory.

    Args:
        previous: digest of the line before. known: values and names of fields; those of this entry are added.
    """
    values = vars(entry)  # equal ones take their places: the entry is still what was validated
    for name in _SHARED:
        if name in values:
            values[name] = known.setdefault(values[name], values[name])
    values["previous"] = previous
    names = known.setdefault(frozenset(entry.model_fields_set), entry.model_fields_set)
    object.__setattr__(entry, "__pydantic_fields_set__", names)


def _entry(document: object, where: str) -> Entry:
    """A line of one of the two kinds. Raises FormatError."""
    kind = document.get("format") if isinstance(document, dict) else None
    is_merge = isinstance(kind, str) and kind.startswith("fedqsn-private-merge/")
    return PrivateMerge.from_document(document, where) if is_merge else Release.from_document(document, where)


def _whole(data: bytes, path: Path) -> int:
    """Length of the part that is whole lines. A torn last line was never acknowledged: its proxy was never published.

    A last line without a line feed (editors strip it) is whole if it is JSON: no part of an object is.

    Raises:
        FormatError: it is another file, which would be overwritten: not even the first line begins as one.
    """
    size = data.rfind(b"\n") + 1
    try:
        strictjson.loads(data[size:], "")
    except FormatError:
        if size == 0 and not data.startswith(_BEGINS[: len(data)]):
            raise FormatError("is not a ledger", where=path, hint="choose another path") from None
        return size
    return len(data)
