"""A part over FLARE: the owner of a file offers it under a reference, and the other side asks for chunk after chunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nvflare.fuel.f3.streaming.download_service import Consumer, Downloadable, ProduceRC, download_object
from nvflare.fuel.f3.streaming.obj_downloader import ObjectDownloader

from fedqsn_cli.courier.parts import Offer, Part, PartWriter, fetch_file
from fedqsn_cli.errors import FormatError

CHUNK = 4 << 20
_TRANSACTION = 24 * 3600.0  # seconds without a request after which an offer ends
_REQUEST = 120.0  # seconds for a chunk


class OfferedPart(Downloadable):  # type: ignore[misc]
    """A part of a file, read when it is asked for."""

    def __init__(self, path: Path, part: Part) -> None:
        super().__init__(str(path))
        self._path = path
        self._part = part

    def produce(self, state: dict[str, Any] | None, requester: str) -> tuple[str, bytes | None, dict[str, Any]]:
        """The chunk after what has come so far."""
        done = int((state or {}).get("taken", 0))
        if not 0 <= done < self._part.length:
            return ProduceRC.EOF, None, {}
        with self._path.open("rb") as file:
            file.seek(self._part.start + done)
            data = file.read(min(CHUNK, self._part.length - done))
        return ProduceRC.OK, data, {"taken": done + len(data)}


class WrittenPart(Consumer):  # type: ignore[misc]
    """Writes what comes; the state is how many bytes have."""

    supports_pipelining = True  # the producer's next state does not depend on what is done with a chunk

    def __init__(self, writer: PartWriter) -> None:
        super().__init__()
        self._writer = writer
        self.failure: str | None = None

    def consume(self, ref_id: str, state: dict[str, Any], data: bytes) -> dict[str, Any]:
        """Take a chunk."""
        self._writer.write(data)
        return state

    def download_completed(self, ref_id: str) -> None:
        """Whoever asked for the part checks it."""

    def download_failed(self, ref_id: str, reason: str) -> None:
        """Keep the reason for whoever asked."""
        self.failure = reason


def offer_file(path: Path, cell: Any) -> dict[str, Any]:
    """Offer a file to one receiver."""
    downloader = ObjectDownloader(cell, timeout=_TRANSACTION, num_receivers=1)
    made = Offer.of(path, lambda file, part: str(downloader.add_object(OfferedPart(file, part))))
    return made.to_document()


def fetch_offered(document: Any, sender: str, target: Path, cell: Any, abort: Any) -> int:
    """Fetch a file that was offered; returns how many parts were there already.

    Args:
        sender: the cell that offers it. abort: ends the download.

    Raises:
        FormatError: the offer is malformed, or a part did not arrive as it was sent.
    """

    def fetch(part: Part, writer: PartWriter) -> None:
        consumer = WrittenPart(writer)
        download_object(sender, part.reference, _REQUEST, cell, consumer, abort_signal=abort)
        if consumer.failure is not None:
            raise FormatError(f"a part did not arrive ({consumer.failure})", where=target)

    return fetch_file(Offer.from_document(document), target, fetch)
