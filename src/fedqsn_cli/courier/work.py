"""What a site does with a proxy: open it, look at what is asked for, train in a child process, seal the answer.

Each step leaves its result in the folder of the round, so that a site that was interrupted goes on where it was, and a
round that is asked for twice is trained once.

    rounds/ID/proxy.sealed, proxy, update, update.sealed
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from fedqsn_cli.artifacts.manifests import PROXY_MANIFEST, file_digest
from fedqsn_cli.checkpoint.files import try_lock
from fedqsn_cli.courier.layout import Site
from fedqsn_cli.courier.parts import Offer
from fedqsn_cli.courier.recipe import Recipe
from fedqsn_cli.courier.site import SiteSettings
from fedqsn_cli.crypto.keys import load_verify_key
from fedqsn_cli.crypto.seal import seal, unseal
from fedqsn_cli.options import SealOptions, UnsealOptions

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
    """Add a line to the site's log."""
    with site.log.open("a", encoding="utf-8") as file:
        file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {text}\n")


@dataclass(frozen=True, slots=True)
class SiteRound:
    """A proxy that was sent to a site, and its answer.

    Args:
        folder: named after the bytes that were sent.
    """

    site: Site
    folder: Path

    @classmethod
    def of(cls, site: Site, offer: Offer) -> Self:
        """The round of an offer; makes its folder."""
        told = " ".join(part.sha256 for part in offer.parts)
        folder = site.rounds / hashlib.sha256(told.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return cls(site, folder)

    @property
    def sealed_proxy(self) -> Path:
        """What came."""
        return self.folder / "proxy.sealed"

    @property
    def sealed_update(self) -> Path:
        """What goes back."""
        return self.folder / "update.sealed"

    @property
    def _lock(self) -> Path:
        return self.folder / "lock"

    @contextlib.contextmanager
    def alone(self, ended: Callable[[], bool]) -> Iterator[int]:
        """Wait until nobody else works on this round: a training may have outlived the process that began it.

        Yields:
            The descriptor of the lock.

        Raises:
            NoUpdate: it was ended meanwhile.
        """
        descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while not try_lock(descriptor):
                _wait(ended)
            yield descriptor
        finally:
            os.close(descriptor)

    def answer(self, recipe: str, held: int, ended: Callable[[], bool]) -> None:
        """Make the sealed update.

        Args:
            recipe: signed by the owner. held: the lock of `alone`. ended: whether nobody waits for it any more.

        Raises:
            NoUpdate: the training failed, took too long, or was ended.
            FedqsnError: the proxy or what is asked for is refused.
        """
        proxy, update = self.folder / "proxy", self.folder / "update"
        if self.sealed_update.exists():
            return
        settings = SiteSettings.read(self.site.settings)
        if not proxy.exists():
            options = UnsealOptions(out=proxy, key=self.site.private_key, verify_key=self.site.owner_key)
            unseal(self.sealed_proxy, options)
        digest = file_digest(proxy / PROXY_MANIFEST)
        asked = Recipe.opened(recipe, digest, load_verify_key(self.site.owner_key))
        log(self.site, f"asked to train proxy {digest[:12]}: {' '.join(asked.words())}")
        settings.bounds.require(asked, self.site.settings)
        if not update.exists():
            words = [str(proxy), "--out", str(update), *settings.words(), *asked.words()]
            self._train(words, settings.time_limit, held, ended)
        seal(update, SealOptions(out=self.sealed_update, to=self.site.owner_key))
        log(self.site, f"update of proxy {digest[:12]} is ready")

    def _train(self, words: list[str], limit: float, held: int, ended: Callable[[], bool]) -> None:
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
        _finish(child, limit, ended)
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
