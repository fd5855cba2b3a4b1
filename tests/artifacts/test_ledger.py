"""The ledger: append-only, chained, locked, never half written."""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import os
import stat
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedqsn_cli.artifacts import ledger
from fedqsn_cli.artifacts.ledger import Release
from fedqsn_cli.artifacts.ledger_head import head_path, write_head
from fedqsn_cli.artifacts.manifests import Quantization
from fedqsn_cli.errors import FormatError, InputError
from support.helpers import environment


def release(number: int = 1, **fields: Any) -> Release:
    """One line; another number makes another proxy."""
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    usual: dict[str, Any] = {
        "client": f"c{number}",
        "round": 1,
        "schedule": "fresh",
        "proxy_id": digest,
        "proxy_sha256": digest,
        "p1": 0.1,
        "p2": 0.2,
        "rescale": True,
        "fill": "zero",
        "quantization": None,
        "plan": "1" * 64,
        "model_digest": "2" * 64,
        "job": "3" * 64,
    }
    return Release(**usual | fields)


class Job:
    """A job's key, as a ledger needs it."""

    commitment = "3" * 64

    def seal(self, what: str, *fields: str) -> str:
        return hmac.new(b"key of the tests", repr((what, *fields)).encode(), hashlib.sha256).hexdigest()


JOB = Job()


def plain(releases: list[Release]) -> list[Release]:
    """Without the links of the chain."""
    return [item.model_copy(update={"previous": "0" * 64}) for item in releases]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def test_what_was_recorded_is_read_back_in_order(path: Path) -> None:
    ledger.record(path, JOB, [release(1), release(2)])
    ledger.record(path, JOB, [release(3)])
    assert plain(ledger.read(path)) == [release(1), release(2), release(3)]


def test_a_long_ledger_takes_little_memory_and_releases_stay_independent(path: Path) -> None:
    packed = {"format": "nf4", "block_size": 64, "double_quant": False, "layout": "bnb"}
    releases = [release(number, client="c1", quantization=Quantization(**packed)) for number in range(500)]
    ledger.record(path, JOB, releases)
    tracemalloc.start()
    read = ledger.read(path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert plain(read) == releases
    assert held / 500 < 1500  # 4,400 with objects of its own for each
    changed = read[0].model_copy(update={"p1_least": 0.05})
    assert changed.p1_least == 0.05 and "p1_least" not in read[1].model_fields_set and read[1] != changed


def test_lines_are_the_same_in_blocks_of_any_size(path: Path) -> None:
    ledger.record(path, JOB, [release(number) for number in range(20)])
    data = path.read_bytes()
    for block in (1, 100, 700, len(data) - 1, len(data), len(data) + 1):
        assert list(ledger._lines(data, len(data), block)) == data.splitlines()


def test_each_line_holds_the_digest_of_the_line_before(path: Path) -> None:
    ledger.record(path, JOB, [release(number) for number in range(4)])
    lines = path.read_bytes().splitlines()
    assert json.loads(lines[0])["previous"] == "0" * 64
    for before, line in zip(lines, lines[1:], strict=False):
        assert json.loads(line)["previous"] == hashlib.sha256(before).hexdigest()


def test_a_release_that_is_there_is_not_written_again(path: Path) -> None:
    ledger.record(path, JOB, [release(1), release(2)])
    before = path.read_bytes()
    ledger.record(path, JOB, [release(2), release(1)])
    assert path.read_bytes() == before
    ledger.record(path, JOB, [release(2), release(3)])
    assert plain(ledger.read(path)) == [release(1), release(2), release(3)]
    assert path.read_bytes().startswith(before)


@pytest.mark.parametrize("field", ["client", "round", "p2", "proxy_sha256", "model_digest", "rescale"])
def test_a_proxy_id_with_other_content_is_refused_and_nothing_is_written(field: str, path: Path) -> None:
    ledger.record(path, JOB, [release(1)])
    before = path.read_bytes()
    other = {"client": "dora", "round": 7, "p2": 0.5, "rescale": False}
    other |= {"proxy_sha256": "9" * 64, "model_digest": "9" * 64}
    with pytest.raises(InputError, match="released before with other content"):
        ledger.record(path, JOB, [release(5), release(1, **{field: other[field]})])
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("before", "now", "hint"),
    [
        (60_000, None, "that was with --max-shard-size 60000: do the same now"),
        (None, 60_000, "that was without --max-shard-size: do the same now"),
        (60_000, 60_000, "files next to the model"),
    ],
)
def test_what_a_repeated_export_does_otherwise_is_said(
    before: int | None, now: int | None, hint: str, path: Path
) -> None:
    ledger.record(path, JOB, [release(1, max_shard_bytes=before)])
    with pytest.raises(InputError, match=hint):
        ledger.record(path, JOB, [release(1, max_shard_bytes=now, proxy_sha256="9" * 64)])


def test_every_change_of_an_earlier_line_is_found(path: Path) -> None:
    ledger.record(path, JOB, [release(number) for number in range(3)])
    good = path.read_bytes()
    lines = good.splitlines(keepends=True)
    for number in range(2):
        for position in range(0, len(lines[number]) - 1, 7):
            bad = bytearray(lines[number])
            bad[position] ^= 1
            path.write_bytes(b"".join([*lines[:number], bytes(bad), *lines[number + 1 :]]))
            with pytest.raises(FormatError):
                ledger.read(path)
            with pytest.raises(FormatError):
                ledger.record(path, JOB, [release(9)])
    for broken in (lines[1:], [lines[1], lines[0], lines[2]], [lines[0], lines[2]], [lines[0], lines[0], *lines[1:]]):
        path.write_bytes(b"".join(broken))
        with pytest.raises(FormatError, match="chain"):
            ledger.read(path)


@pytest.mark.parametrize("cut", [1, 50, 200])
def test_a_torn_last_line_is_dropped_and_overwritten(cut: int, path: Path) -> None:
    ledger.record(path, JOB, [release(1)])
    first, head = path.read_bytes(), head_path(path).read_bytes()
    ledger.record(path, JOB, [release(2)])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(first) + cut])
    head_path(path).write_bytes(head)  # the head is written after the lines
    assert plain(ledger.read(path)) == [release(1)]
    ledger.record(path, JOB, [release(2)])
    assert path.read_bytes() == whole


@pytest.mark.parametrize("data", [b"\0" * 99, b"PK\x03\x04", b"[[[", b"notes", b'{"a": ', b'{"clienx'])
def test_another_file_is_not_taken_for_a_torn_ledger_and_overwritten(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    with pytest.raises(FormatError, match="is not a ledger"):
        ledger.record(path, JOB, [release()])
    assert path.read_bytes() == data and os.listdir(path.parent) == [path.name]


def test_a_torn_line_longer_than_what_is_written_next_leaves_no_rest(path: Path) -> None:
    ledger.record(path, JOB, [release(1)])
    first = path.read_bytes()
    path.write_bytes(first + b"x" * 5000)
    ledger.record(path, JOB, [release(2)])
    assert len(path.read_bytes().splitlines()) == 2
    assert plain(ledger.read(path)) == [release(1), release(2)]


def test_a_full_disk_leaves_the_ledger_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.record(path, JOB, [release(1)])
    before = path.read_bytes()
    real = os.pwrite

    def full(descriptor: int, data: bytes, offset: int) -> int:
        if offset > len(before):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[:100], offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        ledger.record(path, JOB, [release(2)])
    monkeypatch.undo()
    assert path.read_bytes() == before


def test_writes_that_come_in_pieces_are_put_together(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, data[:7], offset))
    ledger.record(path, JOB, [release(1), release(2)])
    assert plain(ledger.read(path)) == [release(1), release(2)]


def test_a_missing_ledger_is_an_error_where_there_must_be_one(path: Path) -> None:
    with pytest.raises(InputError, match="no ledger"):
        ledger.read(path)
    assert ledger.read_if_there(path) == []
    assert not path.exists()


@pytest.mark.timeout(300)
def test_what_is_not_a_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(InputError, match="not a regular file"):
            ledger.read_if_there(tmp_path / name)


BAD_FIELDS: list[dict[str, Any]] = [
    {"client": "../x"},
    {"client": ""},
    {"client": "a b"},
    {"client": "a\n"},
    {"round": -1},
    {"round": 1.0},
    {"round": "1"},
    {"round": True},
    {"p1": 1.5},
    {"p1": -0.1},
    {"p2": "0.1"},
    {"proxy_id": "A" * 64},
    {"proxy_id": "1" * 63},
    {"schedule": "daily"},
    {"fill": "ones"},
    {"rescale": 1},
    {"format": "fedqsn-ledger/3"},
    {"more": 1},
    {"quantization": {"format": "nf4"}},
    {"p2": None},
]


@pytest.mark.parametrize("fields", BAD_FIELDS, ids=str)
def test_a_line_with_a_wrong_field_is_refused_with_its_number(fields: dict[str, Any], path: Path) -> None:
    ledger.record(path, JOB, [release(1)])
    line = path.read_bytes()
    document = release(2).model_dump(mode="json") | {"previous": hashlib.sha256(line[:-1]).hexdigest()} | fields
    path.write_bytes(line + json.dumps(document).encode() + b"\n")
    with pytest.raises(FormatError, match=r"ledger\.jsonl:2"):
        ledger.read(path)


WRITER = """
import sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from fedqsn_cli.artifacts import ledger
from artifacts.test_ledger import JOB, release
for number in range(20):
    ledger.record(Path(sys.argv[1]), JOB, [release(int(sys.argv[2]) * 1000 + number)])
"""


def test_processes_that_write_at_once_lose_no_line(path: Path) -> None:
    tests = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", WRITER, path]
    children = [subprocess.Popen([*command, str(number), tests], env=environment()) for number in (1, 2)]
    assert [child.wait(600) for child in children] == [0, 0]
    releases = ledger.read(path)
    assert len(releases) == 40
    assert {item.proxy_id for item in releases} == {release(k * 1000 + n).proxy_id for k in (1, 2) for n in range(20)}


# ---------------------------------------------------------------- the end of a ledger


@pytest.fixture
def sealed(path: Path) -> Path:
    ledger.record(path, JOB, [release(number) for number in range(4)])
    return path


def _rewritten(lines: list[bytes]) -> bytes:
    """The same releases in a new chain."""
    previous, made = "0" * 64, b""
    for line in lines:
        text = json.dumps(json.loads(line) | {"previous": previous}, sort_keys=True, separators=(",", ":")).encode()
        previous = hashlib.sha256(text).hexdigest()
        made += text + b"\n"
    return made


TAMPERED: dict[str, Callable[[list[bytes]], bytes]] = {
    "last line changed": lambda lines: b"".join(lines).replace(b'"c3"', b'"c9"'),
    "last line removed": lambda lines: b"".join(lines[:-1]),
    "last two removed": lambda lines: b"".join(lines[:-2]),
    "last line torn": lambda lines: b"".join(lines)[:-9],
    "emptied": lambda lines: b"",
    "chain rewritten without a line": lambda lines: _rewritten(lines[1:]),
    "chain rewritten with another client": lambda lines: _rewritten([lines[3], *lines[:3]]),
}


@pytest.mark.parametrize("tamper", TAMPERED.values(), ids=TAMPERED)
def test_a_ledger_that_does_not_end_at_its_head_is_refused_with_and_without_the_key(
    tamper: Callable[[list[bytes]], bytes], sealed: Path
) -> None:
    sealed.write_bytes(tamper(sealed.read_bytes().splitlines(keepends=True)))
    bad = sealed.read_bytes()
    for job in (JOB, None):
        with pytest.raises(FormatError, match="removed|changed"):
            ledger.read(sealed, job)
    for trust in (False, True):
        with pytest.raises(FormatError, match="removed|changed"):
            ledger.record(sealed, JOB, [release(9)], trust=trust)
    assert sealed.read_bytes() == bad


def test_a_head_that_was_made_for_a_rewritten_ledger_needs_the_key(sealed: Path) -> None:
    sealed.write_bytes(_rewritten(sealed.read_bytes().splitlines()[:2]))
    last = hashlib.sha256(sealed.read_bytes().splitlines()[-1]).hexdigest()
    document = json.loads(head_path(sealed).read_text())
    document["jobs"][JOB.commitment] |= {"lines": 2, "last": last}
    head_path(sealed).write_text(json.dumps(document))
    with pytest.raises(FormatError, match="not sealed with this job's key"):
        ledger.read(sealed, JOB)
    assert len(ledger.read(sealed)) == 2  # who has no key cannot know


def test_a_ledger_that_is_gone_is_not_begun_anew(sealed: Path) -> None:
    sealed.unlink()
    for reader in (ledger.read, ledger.read_if_there):
        with pytest.raises(InputError, match="the ledger is gone"):
            reader(sealed, JOB)
    with pytest.raises(FormatError, match="releases were removed"):
        ledger.record(sealed, JOB, [release(9)])


def test_a_lost_head_is_made_again_on_request_only(sealed: Path) -> None:
    head_path(sealed).unlink()
    with pytest.raises(FormatError, match=r"no head .*--trust-records"):
        ledger.record(sealed, JOB, [release(9)])
    with pytest.raises(FormatError, match="no head"):
        ledger.read(sealed, JOB)
    ledger.record(sealed, JOB, [release(1)], trust=True)
    assert len(ledger.read(sealed, JOB)) == 4
    assert stat.S_IMODE(head_path(sealed).stat().st_mode) == 0o600


def test_every_job_seals_its_own_end(sealed: Path) -> None:
    other = Job()
    other.commitment = "4" * 64
    ledger.record(sealed, other, [release(8, job="4" * 64)])
    assert len(ledger.read(sealed, JOB)) == len(ledger.read(sealed, other)) == 5
    ledger.record(sealed, JOB, [release(9)])
    assert len(ledger.read(sealed, other)) == 6


@pytest.mark.parametrize("step", [1, 2])
def test_a_kill_before_a_head_is_written_loses_no_release(
    step: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the first head: nothing was released. Before the second: the lines are there, and count."""
    calls = iter(range(1, 9))

    def killed(*arguments: Any) -> None:
        if next(calls) == step:
            raise KeyboardInterrupt
        write_head(*arguments)

    monkeypatch.setattr(ledger, "write_head", killed)
    with pytest.raises(KeyboardInterrupt):
        ledger.record(path, JOB, [release(1), release(2)])
    monkeypatch.undo()
    assert len(ledger.read(path, JOB)) == (0 if step == 1 else 2)
    ledger.record(path, JOB, [release(1), release(2)])
    assert len(ledger.read(path, JOB)) == 2
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(FormatError, match="removed"):
        ledger.read(path, JOB)


def test_a_whole_last_line_without_its_line_feed_counts(sealed: Path) -> None:
    whole = sealed.read_bytes()
    sealed.write_bytes(whole[:-1])
    assert len(ledger.read(sealed, JOB)) == 4
    ledger.record(sealed, JOB, [release(5)])
    assert sealed.read_bytes().startswith(whole)
    assert len(ledger.read(sealed, JOB)) == 5


@pytest.mark.parametrize("fields", [{"p1": 0.5}, {"plan": "9" * 64}, {"p1_least": 0.01}], ids=str)
def test_a_release_that_contradicts_its_job_is_refused(fields: dict[str, Any], sealed: Path) -> None:
    before = sealed.read_bytes()
    with pytest.raises(InputError, match="releases of this job with p1 = 0.1"):
        ledger.record(sealed, JOB, [release(9, **fields)])
    assert sealed.read_bytes() == before
