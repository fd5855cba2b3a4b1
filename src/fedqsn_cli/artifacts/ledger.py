"""The server's append-only record of every proxy it released.

One JSON line a release. Each line holds the SHA-256 of the line before it, so that a line that was changed, removed
or moved is detected. A release is recorded *before* its proxy appears: there is no proxy without a line.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fedqsn_cli import strictjson, validate
from fedqsn_cli.artifacts.manifests import (
    Count,
    Fill,
    Quantization,
    Ratio,
    ServerRatio,
    Sha256,
    Strict,
    TrainsFill,
)
from fedqsn_cli.checkpoint.header import open_regular_file
from fedqsn_cli.errors import FormatError, InputError

_NO_LINE = "0" * 64
ClientId = Annotated[str, Field(pattern=f"^{validate.CLIENT_ID}$")]


class Release(Strict):
    """One released proxy."""

    format: Literal["fedqsn-ledger/1"] = "fedqsn-ledger/1"
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
    quantization: Quantization | None
    plan: Sha256
    model_digest: Sha256
    job: Sha256
    previous: Sha256 = _NO_LINE


def read(path: Path) -> list[Release]:
    """All releases in order; checks the chain of lines.

    Raises:
        InputError: there is no such file. FormatError: a line is malformed, or the chain is broken.
    """
    if not path.exists():
        raise InputError("no ledger here", where=path, hint="it is written by 'fedqsn export-proxy --ledger'")
    with open(open_regular_file(path), "rb") as file:
        data = file.read()
    return _parse(data[: _whole_lines(data)], path)[0]


def check(path: Path) -> None:
    """Refuse a damaged ledger before any work is done; one that does not exist yet is fine.

    Raises:
        InputError: it is not a regular file. FormatError: a line is malformed, or the chain is broken.
    """
    if path.exists():
        read(path)


def record(
    path: Path, releases: Sequence[Release], *, check: Callable[[Sequence[Release]], None] | None = None
) -> None:
    """Append releases and flush them to disk; a release that the ledger already has is not written again.

    Args:
        check: called with all earlier releases, under the ledger's lock. If it raises, nothing is recorded.

    Raises:
        FormatError: the ledger is damaged. InputError: the ledger has other content for the proxy id of a release.
    """
    with _locked(path) as descriptor:
        data = _read_all(descriptor)
        size = _whole_lines(data)  # a torn last line was never acknowledged: its proxy was never published
        known, previous = _parse(data[:size], path)
        if check is not None:
            check(known)
        lines = b""
        for release in _unknown(known, releases, path):
            line = strictjson.dumps(release.model_copy(update={"previous": previous}).model_dump(mode="json")).encode()
            previous = hashlib.sha256(line).hexdigest()
            lines += line + b"\n"
        if lines:
            _append(descriptor, size, lines)


def _unknown(known: Sequence[Release], releases: Sequence[Release], path: Path) -> Iterator[Release]:
    by_id = {release.proxy_id: release for release in known}
    for release in releases:
        old = by_id.get(release.proxy_id)
        if old is None:
            yield release
        elif old.model_copy(update={"previous": _NO_LINE}) != release.model_copy(update={"previous": _NO_LINE}):
            raise InputError(
                f"proxy {release.proxy_id[:12]} for client {release.client!r} was released before with other content",
                where=path,
                hint="files next to the model (tokenizer, config) changed since; use a new --round",
            )


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


def _read_all(descriptor: int) -> bytes:
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        return file.read()


def _whole_lines(data: bytes) -> int:
    """Length of the part that ends with a line feed."""
    return data.rfind(b"\n") + 1


def _parse(data: bytes, path: Path) -> tuple[list[Release], str]:
    releases: list[Release] = []
    previous = _NO_LINE
    for number, line in enumerate(data.splitlines(), start=1):
        where = f"{path}:{number}"
        release = Release.from_document(strictjson.loads(line, where), where)
        if release.previous != previous:
            raise FormatError("the chain of the ledger is broken here", where=where, hint="restore it from a backup")
        releases.append(release)
        previous = hashlib.sha256(line).hexdigest()
    return releases, previous
