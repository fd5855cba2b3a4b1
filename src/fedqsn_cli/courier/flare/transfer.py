"""A part over FLARE: the owner of a file offers it under a reference, and the other side asks for chunk after chunk."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from nvflare.fuel.f3.streaming.download_service import Consumer, Downloadable, ProduceRC, download_object
from nvflare.fuel.f3.streaming.obj_downloader import ObjectDownloader

from fedqsn_cli.courier.parts import Part, Parts, PartWriter, fetch_file
from fedqsn_cli.errors import FormatError

CHUNK = 4 << 20
_TRANSACTION = 24 * 3600.0  # seconds without a request after which an offer ends
_REQUEST = 120.0  # seconds for a chunk
_COLLECTED = 8  # chunks after which those that were sent are freed


def free_sent(taken: int) -> None:
    """Free the chunks that FLARE has sent or received, after every `_COLLECTED` of them.

    FLARE's records of a message refer to each other, so each lives, with its chunk, until the cyclic garbage collector
    looks at its generation; for the oldest one that is rarely, and until then most of a file is in memory.

    Args:
        taken: bytes of the part so far.
    """
    if taken // CHUNK % _COLLECTED == 0:
        gc.collect()


def _settle() -> None:
    """Let `free_sent` pass over what is there before a transfer: hundreds of thousands of objects that stay."""
    gc.collect()
    gc.freeze()


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
        free_sent(done)
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
        free_sent(self._writer.write(data))
        return state

    def download_completed(self, ref_id: str) -> None:
        """Whoever asked for the part checks it."""

    def download_failed(self, ref_id: str, reason: str) -> None:
        """Keep the reason for whoever asked."""
        self.failure = reason


def offer_parts(path: Path, parts: Parts, cell: Any) -> list[str]:
    """Offer a file to one receiver; returns the references of its parts."""
    _settle()
    downloader = ObjectDownloader(cell, timeout=_TRANSACTION, num_receivers=1)
    return [str(downloader.add_object(OfferedPart(path, part))) for part in parts.parts]


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
    _settle()

    def fetch(part: Part, writer: PartWriter) -> None:
        consumer = WrittenPart(writer)
        try:
            download_object(sender, known[part], _REQUEST, cell, consumer, abort_signal=abort)
        except Exception as error:  # FLARE asserts what its messages hold, and a sender may lie in any of them
            raise FormatError(f"a part did not arrive ({error!r})", where=target) from error
        if consumer.failure is not None:
            raise FormatError(f"a part did not arrive ({consumer.failure})", where=target)

    return fetch_file(parts, target, fetch)
