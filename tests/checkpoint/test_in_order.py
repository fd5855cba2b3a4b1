"""Plain files from beginning to end: whatever the disk can do, the same bytes."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqsn_cli.checkpoint import in_order
from fedqsn_cli.checkpoint.direct_io import SAMPLES, is_uncached
from fedqsn_cli.checkpoint.in_order import BUFFER_BYTES, InOrderReader, InOrderWriter, ahead
from fedqsn_cli.linux import PAGE

LARGE = os.urandom(2 * BUFFER_BYTES + PAGE + 7)


@pytest.fixture
def disk() -> Iterator[Path]:
    """A folder that is on a disk, if /var/tmp is; other temporary files of tests are in memory where that has room."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        yield Path(folder)


def written(path: Path, data: bytes, offset: int = 0, piece: int = 1 << 20) -> bytes:
    """What lies in a file afterwards."""
    with path.open("r+b", buffering=0) as file:
        writer = InOrderWriter(file.fileno(), offset)
        for start in range(0, len(data), piece):
            writer.write(memoryview(data)[start : start + piece])
        writer.finish()
        os.fsync(file.fileno())
    return path.read_bytes()


def uncached(path: Path, data: bytes) -> Path:
    """A file of these bytes that is not in the page cache."""
    path.touch()
    written(path, data)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if not is_uncached(file.fileno(), len(data)):
            pytest.skip("this file system keeps its files in memory")
    return path


@given(data=st.binary(max_size=5 * PAGE), offset=st.sampled_from([0, 1, PAGE, PAGE + 1]), piece=st.integers(1, 9000))
def test_bytes_land_in_their_place_and_nowhere_else(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, offset: int, piece: int
) -> None:
    path = tmp_path_factory.mktemp("order") / "file"
    path.write_bytes(b"!" * (offset + len(data) + 10))
    with pytest.MonkeyPatch.context() as patch:  # patched: full buffers without megabytes in each example
        patch.setattr(in_order, "BUFFER_BYTES", 2 * PAGE)
        assert written(path, data, offset, piece) == b"!" * offset + data + b"!" * 10


def test_a_large_file_leaves_the_page_cache_to_others(disk: Path) -> None:
    path = uncached(disk / "file", bytes(SAMPLES * PAGE))  # skips where that cannot be seen
    assert written(path, LARGE) == LARGE  # and reading it here has filled the cache
    os.truncate(path, 0)
    with path.open("r+b", buffering=0) as file:
        writer = InOrderWriter(file.fileno())
        writer.write(LARGE)
        writer.finish()
        assert is_uncached(file.fileno(), len(LARGE))


@pytest.mark.parametrize("accepted", [0, PAGE])
def test_a_file_system_that_refuses_at_the_last_moment_gets_all_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accepted: int
) -> None:
    """Of the first buffer it takes so many bytes."""
    pwrite, calls = os.pwrite, []

    def refusing(descriptor: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 1 and accepted:
            return pwrite(descriptor, data[:accepted], offset)
        if len(calls) <= 2:
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(in_order, "set_direct", lambda descriptor, wanted=True: wanted)
    monkeypatch.setattr(os, "pwrite", refusing)
    (tmp_path / "file").touch()
    if accepted:
        assert written(tmp_path / "file", LARGE) == LARGE and calls[:3] == [0, accepted, accepted]
    else:
        with pytest.raises(OSError, match="Invalid argument"):  # refused through the page cache, too
            written(tmp_path / "file", LARGE)


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    with open("/dev/full", "wb", buffering=0) as file:
        writer = InOrderWriter(file.fileno())
        writer.write(b"x")
        with pytest.raises(OSError, match="No space left"):
            writer.finish()


@given(counts=st.lists(st.integers(1, 7000), max_size=9), size=st.integers(0, 5 * PAGE))
def test_a_file_is_read_in_any_pieces(tmp_path_factory: pytest.TempPathFactory, counts: list[int], size: int) -> None:
    path, data = tmp_path_factory.mktemp("order") / "file", os.urandom(size)
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch, path.open("rb", buffering=0) as file:
        patch.setattr(in_order, "BUFFER_BYTES", 2 * PAGE)
        reader, start = InOrderReader(file.fileno()), 0
        for count in counts:
            assert reader.read(count) == data[start : start + count]
            start += count


@pytest.mark.parametrize("refusing", [False, True])
def test_a_file_that_is_not_in_the_page_cache_is_read_around_it(
    disk: Path, monkeypatch: pytest.MonkeyPatch, refusing: bool
) -> None:
    path, readv, calls = uncached(disk / "file", LARGE), os.readv, []

    def once_refusing(descriptor: int, buffers: list[mmap.mmap]) -> int:
        calls.append(descriptor)
        if refusing and len(calls) == 1:
            raise OSError(errno.EINVAL, "Invalid argument")
        return readv(descriptor, buffers)

    monkeypatch.setattr(os, "readv", once_refusing)
    with path.open("rb", buffering=0) as file:
        reader = InOrderReader(file.fileno())
        assert reader.read(len(LARGE) + 1) == LARGE and reader.read(1) == b""
        assert is_uncached(file.fileno(), len(LARGE)) != refusing


def test_pieces_are_made_ahead_in_their_order() -> None:
    made, may_end = list[int](), threading.Event()

    def pieces() -> Iterator[int]:
        for number in range(10):
            made.append(number)
            if number == 3:
                may_end.set()
            yield number

    taken = ahead(pieces())
    assert next(taken) == 0 and may_end.wait(60)  # before they are asked for
    assert list(taken) == list(range(1, 10)) == made[1:]


def test_an_error_comes_in_its_place_and_nothing_goes_on_afterwards() -> None:
    def pieces() -> Iterator[int]:
        yield from (1, 2)
        raise ValueError("broken")

    before, got = threading.active_count(), list[Any]()
    with pytest.raises(ValueError, match="broken"):
        for piece in ahead(pieces()):
            got.append(piece)
    assert got == [1, 2] and threading.active_count() == before


def test_whoever_takes_no_more_ends_the_thread() -> None:
    def endless() -> Iterator[int]:
        while True:
            yield 1

    before = threading.active_count()
    with closing(ahead(endless())) as pieces:
        assert next(pieces) == 1 and threading.active_count() == before + 1
    assert threading.active_count() == before
