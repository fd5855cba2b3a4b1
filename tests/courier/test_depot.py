"""The server's process carries files for its workers; a worker that ends takes its transfers with it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.apis.event_type import EventType
from nvflare.apis.signal import Signal

from fedqsn_cli.courier.flare import depot
from fedqsn_cli.courier.flare.depot import CourierDepot, Depot
from fedqsn_cli.courier.parts import Part, Parts
from fedqsn_cli.errors import FormatError

PARTS = Parts((Part(0, 3, "a" * 64), Part(3, 1, "b" * 64)))


def until(happens: Callable[[], bool]) -> None:
    """Wait for something."""
    deadline = time.monotonic() + 300
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """The kit of a server whose process has started; its path is longer than that of a socket may be."""
    made = tmp_path / ("x" * 120)
    made.mkdir()
    (made / depot.SOCKET).touch()  # of a process that was killed
    context: Any = SimpleNamespace(get_engine=lambda: SimpleNamespace(get_cell=lambda: "cell"))
    served = CourierDepot(str(made))
    for event in (EventType.START_RUN, EventType.SYSTEM_START):
        served.handle_event(event, context)
    return made


class Transfers:
    """In place of FLARE's: what is offered, and how many files are fetched at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.offered: dict[str, Path] = {}
        self.fetching: list[tuple[Any, ...]] = []
        self.fetched = 0
        self.go_on = threading.Event()
        # patched: they need FLARE's processes; test_courier.py runs them
        monkeypatch.setattr(depot, "offer_parts", self.offer)
        monkeypatch.setattr(depot, "withdraw", self.offered.pop)
        monkeypatch.setattr(depot, "fetch_parts", self.fetch)

    def offer(self, path: Path, parts: Parts, cell: str) -> tuple[str, list[str]]:
        self.offered[str(path)] = path
        assert parts == PARTS and cell == "cell"
        return str(path), ["one", "two"]

    def fetch(self, parts: Parts, references: Any, sender: str, target: Path, cell: str, ended: Signal) -> None:
        self.fetching.append((references, sender, target))
        try:
            until(lambda: self.go_on.is_set() or ended.triggered)
            if ended.triggered:
                raise FormatError("ended")
            if references == ["bad"]:
                raise FormatError("a part did not arrive as it was sent", where=target)
            self.fetched += 1
        finally:
            self.fetching.remove((references, sender, target))

    def end_once_begun(self, ended: Signal) -> None:
        """Give this signal when a file is being fetched."""

        def end() -> None:
            until(lambda: bool(self.fetching))
            ended.trigger(True)

        threading.Thread(target=end).start()


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> Transfers:
    return Transfers(monkeypatch)


def test_a_file_is_offered_until_its_worker_ends(kit: Path, transfers: Transfers) -> None:
    worker, other = Depot(kit), Depot(kit)
    assert worker.offer(Path("/proxy"), PARTS) == other.offer(Path("/other"), PARTS) == ["one", "two"]
    assert set(transfers.offered) == {"/proxy", "/other"}
    worker.close()
    until(lambda: set(transfers.offered) == {"/other"})


def test_a_file_is_fetched_or_the_worker_is_told_why_not(kit: Path, transfers: Transfers) -> None:
    transfers.go_on.set()
    worker = Depot(kit)
    worker.fetch(PARTS, ["a", "b"], "alice.job", Path("/update"), Signal())
    with pytest.raises(FormatError, match="/update: a part did not arrive"):
        worker.fetch(PARTS, ["bad"], "alice.job", Path("/update"), None)
    assert transfers.fetched == 1


def test_a_job_that_is_ended_ends_its_fetch(kit: Path, transfers: Transfers) -> None:
    worker, abort = Depot(kit), Signal()
    transfers.end_once_begun(abort)
    with pytest.raises(FormatError, match="the job was ended"):
        worker.fetch(PARTS, [], "alice.job", Path("/update"), abort)
    worker.close()
    until(lambda: not transfers.fetching)


def test_two_workers_never_write_one_file_at_once(kit: Path, transfers: Transfers) -> None:
    killed, next_one = Depot(kit), Depot(kit)
    first, second = (
        Signal(),
        threading.Thread(target=next_one.fetch, args=(PARTS, ["new"], "alice.job", Path("/update"), None)),
    )
    transfers.end_once_begun(first)
    with pytest.raises(FormatError):
        killed.fetch(PARTS, ["old"], "alice.job", Path("/update"), first)
    second.start()
    time.sleep(0.2)
    assert [references for references, _, _ in transfers.fetching] == [["old"]]
    killed.close()  # as the end of its process does
    until(lambda: [references for references, _, _ in transfers.fetching] == [["new"]])
    transfers.go_on.set()
    second.join()
    assert transfers.fetched == 1


def test_a_worker_without_the_servers_process_says_so(kit: Path, tmp_path: Path, transfers: Transfers) -> None:
    with pytest.raises(OSError):
        Depot(tmp_path).offer(Path("/proxy"), PARTS)
