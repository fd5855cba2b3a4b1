"""Files that appear complete or not at all: replaced, secret, swapped, and swept after a kill."""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path
from typing import Any, NoReturn

import pytest

from fedqsn_cli import linux
from fedqsn_cli.checkpoint import create_secret, files, write_file_atomically
from fedqsn_cli.checkpoint.files import open_regular_file, require_file_target
from fedqsn_cli.errors import InputError
from support.helpers import nothing_written


@pytest.fixture
def umask() -> object:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_is_written_and_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    for data in (b"one", b"two" * 100_000, b""):
        write_file_atomically(path, data)
        assert path.read_bytes() == data
    assert os.listdir(tmp_path) == ["report.json"]


def test_the_mode_follows_the_umask_or_is_exactly_what_was_asked(tmp_path: Path, umask: object) -> None:
    for mask, wanted in ((0o022, 0o644), (0o027, 0o640), (0o077, 0o600)):
        os.umask(mask)
        write_file_atomically(tmp_path / "open", b"")
        write_file_atomically(tmp_path / "exact", b"", mode=0o664)
        assert mode(tmp_path / "open") == wanted
        assert mode(tmp_path / "exact") == 0o664


def test_a_secret_is_private_from_the_start_whatever_the_umask(tmp_path: Path, umask: object) -> None:
    for mask in (0o000, 0o022, 0o277):
        os.umask(mask)
        path = tmp_path / f"job{mask}.key"
        create_secret(path, b"secret")
        assert mode(path) == 0o600
        assert path.stat().st_nlink == 1
        assert path.read_bytes() == b"secret"
    assert len(os.listdir(tmp_path)) == 3


def test_a_secret_never_replaces_anything(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "folder", "link"):
        with pytest.raises(FileExistsError):
            create_secret(tmp_path / name, b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert not (tmp_path / "nowhere").exists()
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "link"]


def test_of_many_that_create_one_secret_one_wins_and_a_reader_sees_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "job.key"
    contents = [bytes([65 + i]) * 100_000 for i in range(8)]
    barrier = threading.Barrier(9)
    winners: list[int] = []
    losers: list[int] = []

    def create(number: int) -> None:
        barrier.wait()
        try:
            create_secret(path, contents[number])
            winners.append(number)
        except FileExistsError:
            losers.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    barrier.wait()
    while not path.exists():
        pass
    assert path.read_bytes() in contents
    for thread in threads:
        thread.join()
    assert len(winners) == 1 and len(losers) == 7  # no file was removed as a leftover before it was locked
    assert path.read_bytes() == contents[winners[0]]
    assert os.listdir(tmp_path) == ["job.key"]


def test_a_secret_never_has_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link, seen = os.link, []

    def watched(*arguments: Any, **options: Any) -> None:
        seen.append(os.listdir(tmp_path))
        link(*arguments, **options)
        seen.append(os.listdir(tmp_path))

    monkeypatch.setattr(os, "link", watched)
    create_secret(tmp_path / "job.key", b"secret")
    assert seen == [[], ["job.key"]]  # a kill before or after leaves nothing else


def test_what_a_killed_run_of_an_earlier_version_left_is_deleted(tmp_path: Path) -> None:
    (tmp_path / f".job.key.fedqsn-{'0' * 16}").write_bytes(b"secret")
    create_secret(tmp_path / "job.key", b"secret")
    assert os.listdir(tmp_path) == ["job.key"]


def test_a_secret_is_created_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.EPERM, "no hard links")

    monkeypatch.setattr(os, "link", no_links)
    create_secret(tmp_path / "job.key", b"secret")
    with pytest.raises(FileExistsError):
        create_secret(tmp_path / "job.key", b"other")
    assert (tmp_path / "job.key").read_bytes() == b"secret"
    assert os.listdir(tmp_path) == ["job.key"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing/file: cannot be written"):
        create_secret(tmp_path / "missing" / "file", b"")
    with pytest.raises(InputError, match="missing: there is no such folder"):
        write_file_atomically(tmp_path / "missing" / "file", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="is a directory"):
        write_file_atomically(tmp_path / "folder", b"")
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize(
    "path", ["/proc/self/status", "/proc/self/fd/../mem", "/sys/kernel/mm/transparent_hugepage/enabled"]
)
def test_what_the_kernel_shows_as_a_file_is_not_read(path: str) -> None:
    with pytest.raises(InputError, match=r"not a regular file|no such file|cannot be opened"):
        open_regular_file(Path(path))


def test_a_file_takes_the_place_of_no_device_and_no_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "link", "broken", "loop"):
        with nothing_written(tmp_path), pytest.raises(InputError, match="is not a plain file"):
            write_file_atomically(tmp_path / name, b"")


@pytest.mark.parametrize("name", ["x" * 240, ".", "/", "missing/file", "/proc/1/file"])
def test_where_no_file_can_be_written_is_told_before_any_work(name: str, tmp_path: Path) -> None:
    target = Path(name) if name == "." else tmp_path / name
    with nothing_written(tmp_path), pytest.raises(InputError):
        require_file_target(target)
    with nothing_written(tmp_path), pytest.raises(InputError):
        write_file_atomically(target, b"")


def test_where_a_file_can_be_written_nothing_is_left_by_asking(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    for name in ("old", "new"):
        require_file_target(tmp_path / name)
    assert os.listdir(tmp_path) == ["old"] and (tmp_path / "old").read_text() == "old"


@pytest.mark.parametrize("path", [Path("/"), Path(".")])
def test_no_file_lies_beside_a_path_without_a_name(path: Path) -> None:
    with pytest.raises(InputError, match="is a directory"):
        files.beside(path, "x")


def test_a_name_with_a_null_character_is_that_of_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        files.open_regular_file(tmp_path / "a\0b")


def test_a_failure_before_the_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger"
    write_file_atomically(path, b"old")

    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_file_atomically(path, b"new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["ledger"]


def test_leftovers_of_killed_runs_are_swept_but_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out*[a-z]"  # a name that a glob would take for a pattern
    stale = [files.staging_path(path) for _ in range(2)]
    stale[0].write_bytes(b"")
    (stale[1] / "deep").mkdir(parents=True)
    held, lock = files.make_staging_directory(path)
    foreign = [files.staging_path(tmp_path / "other"), path.with_name(f".{path.name}.fedqsn-short")]
    foreign.append(path.with_name(f".{path.name}.fedqsn-{'0' * 16}.txt"))
    for other in foreign:
        other.write_bytes(b"")
    link = files.staging_path(path)
    link.symlink_to(foreign[0])
    files.sweep(path)
    assert set(tmp_path.iterdir()) == {held, link, *foreign}
    os.close(lock)
    files.sweep(path)
    assert set(tmp_path.iterdir()) == {link, *foreign}


def test_a_rename_never_takes_a_name_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, taken = tmp_path / "source", tmp_path / "taken"
    source.mkdir()
    taken.mkdir()  # empty: a plain rename would silently replace it
    with pytest.raises(FileExistsError):
        files.rename_exclusive(source, taken)
    monkeypatch.setattr(linux, "_renameat2", not_supported)
    with pytest.raises(FileExistsError):
        files.rename_exclusive(source, taken)
    files.rename_exclusive(source, tmp_path / "free")
    assert sorted(os.listdir(tmp_path)) == ["free", "taken"]


def not_supported(*_: object) -> NoReturn:
    raise OSError(errno.ENOSYS, "not supported")


def two_folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    return tmp_path / "new", tmp_path / "old"


@pytest.mark.parametrize("supported", [True, False])
def test_two_directories_swap_places(supported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, old = two_folders(tmp_path)
    if not supported:
        monkeypatch.setattr(linux, "_renameat2", not_supported)
    files.exchange(new, old)
    assert ((old / "content").read_text(), (new / "content").read_text()) == ("new", "old")
    assert sorted(os.listdir(tmp_path)) == ["new", "old"]


def test_a_swap_that_fails_halfway_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, old = two_folders(tmp_path)
    monkeypatch.setattr(linux, "_renameat2", not_supported)
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if source == new:
            raise OSError(errno.EIO, "broken disk")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="broken disk"):
        files.exchange(new, old)
    assert (old / "content").read_text() == "old"
