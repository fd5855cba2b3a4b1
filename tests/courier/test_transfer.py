"""A part over FLARE: read chunk by chunk, and not kept."""

from __future__ import annotations

import gc
import hashlib
import os
import tempfile
import weakref
from pathlib import Path

import pytest

from fedqsn_cli.checkpoint.direct_io import is_uncached
from fedqsn_cli.courier.flare import transfer
from fedqsn_cli.courier.parts import Part, PartWriter
from fedqsn_cli.errors import FormatError


class Record:
    """As FLARE's records of a message do, it refers to itself, and so outlives its last user."""

    def __init__(self, data: bytes) -> None:
        self.itself, self.data = self, data


def test_a_part_comes_in_chunks_and_few_of_them_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # patched: FLARE makes these objects, and both sides must agree on the size
    monkeypatch.setattr(transfer, "CHUNK", 100)
    data = bytes(range(256)) * 50
    (tmp_path / "file").write_bytes(b"before" + data + b"after")
    part = Part(6, len(data), hashlib.sha256(data).hexdigest())
    source = transfer.OfferedPart(tmp_path / "file", part)
    (tmp_path / "target").write_bytes(bytes(6 + len(data)))
    writer = PartWriter(tmp_path / "target", part)
    target, state, most, alive = transfer.WrittenPart(writer), None, 0, weakref.WeakSet[Record]()
    gc.disable()
    try:
        while True:
            code, chunk, told = source.produce(state, "receiver")
            if chunk is None:
                break
            record = Record(chunk)
            alive.add(record)
            state = target.consume("reference", told, record.data)
            most = max(most, len(alive))
    finally:
        gc.enable()
    writer.finish()
    assert (tmp_path / "target").read_bytes()[6:] == data and most <= 9


@pytest.mark.parametrize("state", [{"taken": -1}, {"taken": 7}, {"taken": 1 << 60}])
def test_nothing_outside_of_a_part_is_read(tmp_path: Path, state: dict[str, int]) -> None:
    (tmp_path / "file").write_bytes(b"before+part+after")
    offered = transfer.OfferedPart(tmp_path / "file", Part(7, 4, ""))
    assert offered.produce({}, "receiver")[1] == b"part" and offered.produce(state, "receiver")[1] is None


def test_a_part_that_grows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4))
    target = transfer.WrittenPart(PartWriter(tmp_path / "file", Part(0, 4, "")))
    state = {"taken": 3}
    assert target.consume("reference", state, b"abc") == state
    with pytest.raises(FormatError, match="longer than it was said"):
        target.consume("reference", {}, b"de")


def test_a_file_that_is_not_in_the_page_cache_is_offered_from_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:  # mostly on a disk; other files of tests are in memory
        path, data = Path(folder) / "file", os.urandom(1 << 20)
        with path.open("wb") as file:
            file.write(data)
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        offered = transfer.OfferedPart(path, Part(5, 900_000, ""))
        monkeypatch.setattr(transfer, "CHUNK", 500_000)
        chunks = [offered.produce({"taken": done}, "receiver")[1] for done in (0, 500_000)]
        assert chunks == [data[5:500_005], data[500_005:900_005]]
        with path.open("rb") as file:
            before = is_uncached(file.fileno(), len(data))
        monkeypatch.setattr(transfer, "read_direct", lambda *_: None)  # a file system that cannot
        assert offered.produce({"taken": 500_000}, "receiver")[1] == chunks[1]
        with path.open("rb") as file:
            assert before or not is_uncached(file.fileno(), len(data))
