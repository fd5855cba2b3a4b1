"""Work with limits: results and errors come back, and what takes too much is ended with one line."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedqsn_cli.errors import DataError, InputError
from fedqsn_cli.models import child_process
from fedqsn_cli.models.child_process import in_child, stream_from_child


def ran(work: Callable[[], Any], seconds: float = 1) -> Any:
    return in_child(work, what="the work", where="a folder", seconds=seconds)


def refused() -> None:
    raise DataError("bad row", where="file: row 3", hint="mend it")


def broken() -> None:
    raise KeyError("name")


def panicked() -> None:
    class PanicException(BaseException):
        """As code in Rust raises it."""

    raise PanicException("out of range")


def looping() -> None:
    while True:
        pass


def waiting() -> None:
    time.sleep(60)


def hoarding() -> int:
    return len(bytearray(8 << 30))


def killed() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def left() -> None:
    os._exit(0)


def open_files() -> list[str]:
    listed = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sorted({os.readlink(path) for path in listed if os.path.lexists(path)})


def test_nothing_that_the_parent_has_open_or_locked_is_open_in_the_child(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("a key")
    with (tmp_path / "secret").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = ran(open_files)
    assert os.devnull in found
    assert [path for path in found if path.startswith("/") and path != os.devnull] == []


def test_a_result_comes_back_as_json_holds_it() -> None:
    assert ran(lambda: {"a": [1, None, "\u00e9", 1.5]}) == {"a": [1, None, "\u00e9", 1.5]}
    assert len(ran(lambda: list(range(300_000)))) == 300_000  # more than a pipe holds


def test_an_error_of_ours_comes_back_whole() -> None:
    with pytest.raises(DataError) as caught:
        ran(refused)
    assert (caught.value.what, str(caught.value.where), caught.value.hint) == ("bad row", "file: row 3", "mend it")


@pytest.mark.parametrize("work", [broken, panicked])
def test_any_other_error_is_bad_input(work: Callable[[], None]) -> None:
    with pytest.raises(InputError, match="a folder: the work fails"):
        ran(work)


@pytest.mark.parametrize("work", [hoarding, killed, left])
def test_too_much_memory_or_a_crash_is_bad_input(work: Callable[[], None]) -> None:
    with pytest.raises(InputError, match="too much memory, or crashes"):
        ran(work)


def test_what_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    with pytest.raises(InputError, match="takes too long"):
        ran(looping)
    monkeypatch.setattr(child_process.time, "monotonic", lambda clock=time.monotonic: clock() * 8)
    with pytest.raises(InputError, match="takes too long"):
        ran(waiting)
    monkeypatch.undo()
    assert time.monotonic() - started < 40  # seconds, on a machine that is busy


def streamed(work: Callable[[], Iterator[bytes]]) -> Iterator[bytes]:
    return stream_from_child(work, what="the work", where="a folder", seconds=1)


def test_a_stream_comes_piece_by_piece() -> None:
    def pieces() -> Iterator[bytes]:
        yield from (bytes([number]) * 300_000 for number in range(9))  # more than a pipe holds

    assert list(streamed(pieces)) == list(pieces())
    assert next(streamed(pieces)) == bytes(300_000)  # nobody takes the others


@pytest.mark.parametrize(
    ("ends", "kind", "complaint"), [(refused, DataError, "bad row"), (killed, InputError, "crash")]
)
def test_a_stream_may_end_with_an_error(ends: Callable[[], None], kind: type[InputError], complaint: str) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"first"
        ends()

    taken = streamed(pieces)
    assert next(taken) == b"first"
    with pytest.raises(InputError, match=complaint):
        next(taken)


def children() -> set[str]:
    """Processes that this one started, ended ones that nobody waited for included."""
    return {child for task in Path("/proc/self/task").glob("*/children") for child in task.read_text().split()}


def test_a_child_changes_nothing_here(tmp_path: Path) -> None:
    seen: list[int] = []
    before = children()
    with pytest.raises(InputError):
        ran(lambda: (tmp_path / "file").write_text("x" * 10_000))
    assert ran(lambda: seen.append(1)) is None
    assert seen == []
    assert children() <= before
