"""The server's own process sends and receives the files of all jobs; their workers ask it to, over a socket beside it.

FLARE gives each job a worker, and a worker's messages to a site pass through the server's process. A file that the
worker sent would be received there and sent once more; this one is sent, or received, where the line to the site is.

The socket lies in the server's kit, which nobody else may enter. A worker sends one line of JSON, {"offer": ...} or
{"fetch": ...}, and gets one. It keeps its connection while it needs the file: when that ends, so does the transfer.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.apis.signal import Signal

from fedqsn_cli.courier.flare.transfer import fetch_parts, offer_parts, settle, withdraw
from fedqsn_cli.courier.parts import Parts
from fedqsn_cli.errors import FedqsnError, FormatError

SOCKET = "depot.sock"
_POLL = 0.5  # seconds between two looks at whether a job was ended
_WAITING = 128  # connections


class CourierDepot(FLComponent):  # type: ignore[misc]
    """At the server, in its own process: offers and fetches files for the workers.

    Args:
        kit: the server's.
    """

    def __init__(self, kit: str) -> None:
        super().__init__()
        self._kit = Path(kit)
        self._cell: Any = None
        self._fetched: set[str] = set()
        self._changed = threading.Condition()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Open the socket when the server's process starts; in a worker this never comes."""
        if event_type == EventType.SYSTEM_START:
            self._cell = fl_ctx.get_engine().get_cell()
            settle()
            (self._kit / SOCKET).unlink(missing_ok=True)
            listening = socket.socket(socket.AF_UNIX)
            with _address(self._kit) as address:
                listening.bind(address)
            listening.listen(_WAITING)
            threading.Thread(target=self._serve, args=(listening,), daemon=True).start()

    def _serve(self, listening: socket.socket) -> None:
        while True:
            connection, _ = listening.accept()
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, suppress(ConnectionError):  # the worker has ended
            with connection.makefile() as lines:
                asked = json.loads(lines.readline() or "{}")
            ended = Signal()
            watch = threading.Thread(target=_end_with, args=(connection, ended), daemon=True)
            watch.start()
            if "offer" in asked:
                self._offer(connection, watch, **asked["offer"])
            elif "fetch" in asked:
                _tell(connection, problem=self._fetch(ended, **asked["fetch"]))

    def _offer(self, connection: socket.socket, watch: threading.Thread, path: str, parts: list[Any]) -> None:
        """Offer a file for as long as the worker is there."""
        offer, references = offer_parts(Path(path), Parts.from_document(parts), self._cell)
        try:
            _tell(connection, references=references)
            watch.join()
        finally:
            withdraw(offer)

    def _fetch(self, ended: Signal, target: str, parts: list[Any], references: Any, sender: str) -> str | None:
        """Fetch a file; returns what went wrong, if anything did."""
        try:
            with self._alone(target):
                if not ended.triggered:
                    fetch_parts(Parts.from_document(parts), references, sender, Path(target), self._cell, ended)
        except (FedqsnError, OSError) as error:
            return str(error)
        return None

    @contextmanager
    def _alone(self, target: str) -> Iterator[None]:
        """Wait until a fetch of the same file, for a worker that was killed, has ended."""
        with self._changed:
            self._changed.wait_for(lambda: target not in self._fetched)
            self._fetched.add(target)
        try:
            yield
        finally:
            with self._changed:
                self._fetched.remove(target)
                self._changed.notify_all()


def _end_with(connection: socket.socket, ended: Signal) -> None:
    """Trigger a signal when the other side is gone: it sends nothing more before."""
    with suppress(OSError):
        connection.recv(1)
    ended.trigger("the worker has ended")


def _tell(connection: socket.socket, **answer: Any) -> None:
    connection.sendall(json.dumps(answer).encode() + b"\n")


@contextmanager
def _address(kit: Path) -> Iterator[str]:
    """The socket's address, short enough however long the path is."""
    folder = os.open(kit, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{SOCKET}"
    finally:
        os.close(folder)


class Depot:
    """A worker's connection: what was offered by it is withdrawn when it is closed.

    Args:
        kit: the server's.

    Raises:
        OSError: the server's process does not listen.
    """

    def __init__(self, kit: Path) -> None:
        self._kit = kit
        self._open: list[socket.socket] = []

    def offer(self, path: Path, parts: Parts) -> list[str]:
        """Offer a file to one site; returns the references of its parts. Raises OSError."""
        answer = self._ask(None, offer={"path": str(path), "parts": parts.to_document()})
        return [str(reference) for reference in answer["references"]]

    def fetch(self, parts: Parts, references: Any, sender: str, target: Path, abort: Signal | None) -> None:
        """Fetch a file that a site offers; see `fetch_parts`. Raises FormatError, OSError."""
        offer = {"parts": parts.to_document(), "references": references, "sender": sender, "target": str(target)}
        problem = self._ask(abort, fetch=offer)["problem"]
        if problem is not None:
            raise FormatError(problem)

    def close(self) -> None:
        """Withdraw what was offered."""
        while self._open:
            self._open.pop().close()

    def _ask(self, abort: Signal | None, **asked: Any) -> Any:
        connection = socket.socket(socket.AF_UNIX)
        self._open.append(connection)
        with _address(self._kit) as address:
            connection.connect(address)
        _tell(connection, **asked)
        connection.settimeout(_POLL)
        answer = bytearray()
        while not answer.endswith(b"\n"):
            with suppress(TimeoutError):
                answer += _received(connection)
            if abort is not None and abort.triggered:
                raise FormatError("the job was ended")
        return json.loads(answer)


def _received(connection: socket.socket) -> bytes:
    """What has come. Raises OSError: the other side is gone."""
    if piece := connection.recv(1 << 16):
        return piece
    raise ConnectionError("the server's process has ended")
