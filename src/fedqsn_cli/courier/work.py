"""What a site does with a proxy: open it, look at what is asked for, train in a child process, seal the answer.

Each step leaves its result in the folder of the round, so that a site that was interrupted goes on where it was, and a
round that is asked for twice is trained once.

    rounds/NAME/proxy.sealed, proxy, update, update.sealed
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from fedqsn_cli.artifacts.manifests import PROXY_MANIFEST, file_digest
from fedqsn_cli.checkpoint.files import remove_tree, stream_new_file, try_lock
from fedqsn_cli.courier.layout import Site
from fedqsn_cli.courier.orders import Order
from fedqsn_cli.courier.parts import PartDigests, Parts
from fedqsn_cli.courier.site import SiteSettings
from fedqsn_cli.crypto.keys import load_recipient, load_verify_key
from fedqsn_cli.crypto.seal import sealed_pieces, unseal
from fedqsn_cli.errors import FormatError
from fedqsn_cli.options import UnsealOptions
from fedqsn_cli.text import clean

Fetch = Callable[[Parts, Path], object]

_POLL = 0.2  # seconds
_SAVE_EVERY = "10m"
_PROGRAM = [sys.executable, "-m", "fedqsn_cli"]


class NoUpdate(Exception):
    """There is none, and the owner may know why.

    Args:
        reason: names no file of the site.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def log(site: Site, text: str) -> None:
    """Add a line to the site's log; whatever the text holds, it stays one line."""
    with site.log.open("a", encoding="utf-8") as file:
        file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {clean(text)}\n")


@dataclass(frozen=True, slots=True)
class SiteRound:
    """An order of the owner, and the answer to it.

    Args:
        folder: named after the proxy.
    """

    site: Site
    order: Order
    settings: SiteSettings
    folder: Path

    @classmethod
    def of(cls, site: Site, text: str) -> Self:
        """The round of an order; makes its folder. Nothing was fetched yet.

        Args:
            text: the order, signed by the owner.

        Raises:
            SignatureError: the owner did not sign it. FormatError: it is malformed.
            InputError: it asks for more than the site allows.
        """
        order = Order.opened(text, load_verify_key(site.owner_key))
        told = f"{order.sealed.size} bytes: {' '.join(order.proposal.words())}"
        log(site, f"asked to train proxy {order.proxy_sha256[:12]} of {told}")
        settings = SiteSettings.read(site.settings)
        settings.require(order, site.settings)
        folder = site.rounds / order.proxy_sha256[:32]
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return cls(site, order, settings, folder)

    @property
    def sealed_proxy(self) -> Path:
        """What comes."""
        return self.folder / "proxy.sealed"

    @property
    def sealed_update(self) -> Path:
        """What goes back."""
        return self.folder / "update.sealed"

    @property
    def _answered(self) -> Path:
        """Outlives the folder: a proxy that is sent again is not trained again."""
        return self.folder.with_name(self.folder.name + ".answered")

    @contextlib.contextmanager
    def alone(self, ended: Callable[[], bool]) -> Iterator[int]:
        """Wait until nobody else works on this round: a training may have outlived the process that began it.

        Yields:
            The descriptor of the lock.

        Raises:
            NoUpdate: it was ended meanwhile.
        """
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while not try_lock(descriptor):
                _wait(ended)
            yield descriptor
        finally:
            os.close(descriptor)

    def answer(self, fetch: Fetch, held: int, ended: Callable[[], bool]) -> Parts:
        """Make the sealed update; returns its parts.

        Args:
            fetch: gets the sealed proxy. held: the lock of `alone`. ended: whether nobody waits for it any more.

        Raises:
            NoUpdate: the training failed, took too long, or was ended; or the site has removed its answer.
            FedqsnError: the proxy is refused.
        """
        if self.sealed_update.exists():
            self._answered.touch()
            return Parts.of(self.sealed_update)
        if self._answered.exists():
            raise NoUpdate("this proxy was answered before")
        proxy, update = self.folder / "proxy", self.folder / "update"
        if not proxy.exists():
            self._receive(fetch, proxy)
        if not update.exists():
            words = [str(proxy), "--out", str(update), *self.settings.words(), *self.order.proposal.words()]
            self._train(words, held, ended)
        parts = PartDigests()
        stream_new_file(self.sealed_update, parts.through(sealed_pieces(update, load_recipient(self.site.owner_key))))
        self._answered.touch()
        log(self.site, f"update of proxy {self.order.proxy_sha256[:12]} is ready")
        return Parts(parts.finish())

    def _receive(self, fetch: Fetch, proxy: Path) -> None:
        """Fetch the proxy, and open it. Raises FedqsnError: it is refused."""
        if not self.sealed_proxy.exists():
            fetch(self.order.sealed, self.sealed_proxy)
        options = UnsealOptions(out=proxy, key=self.site.private_key, verify_key=self.site.owner_key)
        unseal(self.sealed_proxy, options)
        self.sealed_proxy.unlink()
        if file_digest(proxy / PROXY_MANIFEST) != self.order.proxy_sha256:
            remove_tree(proxy)
            raise FormatError("is not the proxy of its order", where=proxy)

    def _train(self, words: list[str], held: int, ended: Callable[[], bool]) -> None:
        """Run client-train as a child: if memory runs out, it is the child that is killed. Raises NoUpdate."""
        keys = ["--verify-key", str(self.site.owner_key), "--sign", str(self.site.private_key)]
        words = ["client-train", *words, *keys, "--save-every", _SAVE_EVERY]
        with (self.folder / "training.log").open("ab") as output:
            child = subprocess.Popen(
                [*_PROGRAM, *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[held],  # the lock lasts as long as the training, even if this process is killed
            )
        if self.settings.max_memory is not None:
            resource.prlimit(child.pid, resource.RLIMIT_DATA, (self.settings.max_memory, self.settings.max_memory))
        _finish(child, self.settings.time_limit, ended)
        if child.returncode:
            log(self.site, f"client-train ended with {child.returncode}; see {self.folder / 'training.log'}")
            raise NoUpdate(f"the training ended with exit code {child.returncode}")


def _finish(child: subprocess.Popen[bytes], limit: float, ended: Callable[[], bool]) -> None:
    """Wait for a training; it does not outlive its time, nor those who wait for it. Raises NoUpdate."""
    deadline = time.monotonic() + limit
    try:
        while child.poll() is None:
            _wait(ended)
            if time.monotonic() > deadline:
                raise NoUpdate("the training took longer than the site allows")
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()


def _wait(ended: Callable[[], bool]) -> None:
    if ended():
        raise NoUpdate("the round was ended")
    time.sleep(_POLL)
