"""A part over FLARE: the owner of a file offers it under a reference, and the other side asks for chunk after chunk."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from typing import Any

from nvflare.fuel.f3.streaming.download_service import (
    Consumer,
    Downloadable,
    DownloadService,
    ProduceRC,
    download_object,
)
from nvflare.fuel.f3.streaming.obj_downloader import ObjectDownloader

from fedqsn_cli.checkpoint.direct_io import is_uncached, read_direct
from fedqsn_cli.courier.parts import Part, Parts, PartWriter, fetch_file
from fedqsn_cli.errors import FormatError
from fedqsn_cli.linux import set_direct

CHUNK = 8 << 20  # of a part, for each request; larger ones cost less time and more memory
_TRANSACTION = 24 * 3600.0  # seconds without a request after which an offer ends
_REQUEST = 120.0  # seconds for a chunk
_COLLECTED = 4  # chunks after which those that were sent or received are freed


class _Sent:
    """Counts the bytes that have passed, and frees them after every `_COLLECTED`.

    FLARE's records of a message refer to each other, so each lives, with its chunk, until the cyclic garbage collector
    looks at its generation; for the oldest one that is rarely, and until then most of a file is in memory.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes = 0

    def add(self, length: int) -> None:
        """Count so many bytes of any transfer of this process."""
        with self._lock:
            self._bytes += length
            if self._bytes < _COLLECTED * CHUNK:
                return
            self._bytes = 0
        gc.collect()


_SENT = _Sent()


def settle() -> None:
    """Let the collector pass over what is there before all transfers: hundreds of thousands of objects that stay."""
    gc.collect()
    gc.freeze()


class OfferedPart(Downloadable):  # type: ignore[misc]
    """A part of a file, read when it is asked for."""

    def __init__(self, path: Path, part: Part) -> None:
        super().__init__(str(path))
        self._path = path
        self._part = part
        self._direct: bool | None = None  # whether it is read past the page cache, if that is known already

    def produce(self, state: dict[str, Any] | None, requester: str) -> tuple[str, bytes | None, dict[str, Any]]:
        """The chunk after what has come so far."""
        done = int((state or {}).get("taken", 0))
        if not 0 <= done < self._part.length:
            return ProduceRC.EOF, None, {}
        data = self._read(self._part.start + done, min(CHUNK, self._part.length - done))
        _SENT.add(len(data))
        return ProduceRC.OK, data, {"taken": done + len(data)}

    def _read(self, start: int, count: int) -> bytes:
        with self._path.open("rb", buffering=0) as file:
            if self._direct is None:
                self._direct = is_uncached(file.fileno(), os.fstat(file.fileno()).st_size)
            found = read_direct(file.fileno(), start, count) if self._direct and set_direct(file.fileno()) else None
            if found is not None:
                return found.tobytes()
            set_direct(file.fileno(), False)
            return os.pread(file.fileno(), count, start)


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
        _SENT.add(len(data))
        return state

    def download_completed(self, ref_id: str) -> None:
        """Whoever asked for the part checks it."""

    def download_failed(self, ref_id: str, reason: str) -> None:
        """Keep the reason for whoever asked."""
        self.failure = reason


def offer_parts(path: Path, parts: Parts, cell: Any) -> tuple[str, list[str]]:
    """Offer a file to one receiver; returns the offer's name, and the references of its parts."""
    downloader = ObjectDownloader(cell, timeout=_TRANSACTION, num_receivers=1)
    return downloader.tx_id, [str(downloader.add_object(OfferedPart(path, part))) for part in parts.parts]


def withdraw(offer: str) -> None:
    """End an offer."""
    DownloadService.delete_transaction(offer)


def fetch_parts(parts: Parts, references: Any, sender: str, target: Path, cell: Any, abort: Any) -> int:
    """Fetch a file that was offered; returns how many parts were there already.

    Args:
        references: of the parts, as the sender says. sender: the cell that offers them. abort: ends the download.

    Raises:
        FormatError: the references are malformed, or a part did not arrive as it was sent.
    """
    if type(references) is not list or [type(one) for one in references] != [str] * len(parts.parts):
        raise FormatError("is not an offer of these parts", where=target)
    known = dict(zip(parts.parts, references, strict=True))

    def fetch(part: Part, writer: PartWriter) -> None:
        consumer = WrittenPart(writer)
        try:
            download_object(sender, known[part], _REQUEST, cell, consumer, abort_signal=abort)
        except Exception as error:  # FLARE asserts what its messages hold, and a sender may lie in any of them
            raise FormatError(f"a part did not arrive ({error!r})", where=target) from error
        if consumer.failure is not None:
            raise FormatError(f"a part did not arrive ({consumer.failure})", where=target)

    return fetch_file(parts, target, fetch)
