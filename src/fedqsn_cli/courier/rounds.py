"""What is sent to each client, and what counts as its answer."""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedqsn_cli.artifacts.manifests import UpdateManifest, read_manifest
from fedqsn_cli.checkpoint.files import read_file, try_lock, write_file_atomically
from fedqsn_cli.courier.outbox import Consignment
from fedqsn_cli.crypto import dsse
from fedqsn_cli.crypto.seal import unseal
from fedqsn_cli.errors import FormatError, InputError, RefusedUpdate, SignatureError
from fedqsn_cli.options import UnsealOptions

_MIXED = "choose another folder for each round"


class Unreachable(Exception):
    """The server does not answer now."""


@dataclass(frozen=True, slots=True)
class Delivery(ABC):
    """One client's proxy on its way, and where its update is to be.

    Args:
        carried: where the sealed update arrives. inbox: for what is taken.
    """

    sent: Consignment
    carried: Path
    inbox: Path

    @property
    def client(self) -> str:
        """Its name."""
        return self.sent.order.client

    @property
    def sealed_update(self) -> Path:
        """What the courier brings."""
        return self.carried / f"{self.sent.name}.update"

    @property
    @abstractmethod
    def update(self) -> Path:
        """What was taken."""

    @abstractmethod
    def check(self) -> None:
        """Raises InputError: the inbox holds the answer to another order."""

    @abstractmethod
    def take(self) -> None:
        """Take the answer that has come. Raises RefusedUpdate."""

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold what two processes must not send at once. Raises InputError: another one does."""
        lock = self.carried / f"{self.sent.name}.lock"
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # A process that has just ended may have removed the file that this one locked.
            if not try_lock(descriptor) or not _is_at(descriptor, lock):
                hint = "wait until it has ended, or end it"
                raise InputError("another 'fedqsn courier-send' sends this proxy", where=self.client, hint=hint)
            try:
                yield
            finally:
                lock.unlink()
        finally:
            os.close(descriptor)

    @property
    def done(self) -> bool:
        """Whether there is an answer that was taken."""
        return self.update.exists()


def _is_at(descriptor: int, path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())


@dataclass(frozen=True, slots=True)
class Sealed(Delivery):
    """On a host without the owner's key: an update stays sealed, and its order is beside it."""

    @property
    def update(self) -> Path:
        """What was taken."""
        return self.inbox / f"{self.client}.update"

    def check(self) -> None:
        """Raises InputError: the inbox holds the answer to another order."""
        if self.update.exists() and read_file(self._order, dsse.LARGEST) != self.sent.text.encode():
            raise InputError("is the answer to another order", where=self.update, hint=_MIXED)

    @property
    def _order(self) -> Path:
        return self.inbox / f"{self.client}.order"

    def take(self) -> None:
        """Keep the answer."""
        self.inbox.mkdir(parents=True, exist_ok=True)
        write_file_atomically(self._order, self.sent.text.encode())
        shutil.move(self.sealed_update, self.update.with_suffix(".new"))  # perhaps to another file system
        os.replace(self.update.with_suffix(".new"), self.update)


@dataclass(frozen=True, slots=True)
class Opened(Delivery):
    """Where the owner's keys are: an update is opened and checked.

    Args:
        key: the owner's private key. public: the client's public key.
    """

    key: Path
    public: Path

    @property
    def update(self) -> Path:
        """What was taken: a folder."""
        return self.inbox / self.client

    def check(self) -> None:
        """Raises InputError: the inbox holds the update of another proxy."""
        if self.update.exists() and not self._answers(self.update):
            raise InputError("is the update of another proxy", where=self.update, hint=_MIXED)

    def _answers(self, update: Path) -> bool:
        return read_manifest(update, UpdateManifest).proxy_sha256 == self.sent.order.proxy_sha256

    def take(self) -> None:
        """Open the answer, and remove what the courier carried; where the fault is the owner's, it stays.

        Raises:
            RefusedUpdate: the client did not seal and sign it, or it answers something else.
            InputError, OSError: it cannot be opened here, as without the key or room on the disk.
        """
        try:
            self._open()
        except (FormatError, SignatureError, RefusedUpdate) as error:
            self.sealed_update.unlink()
            raise RefusedUpdate(f"the answer of client {self.client!r} is refused: {error.what}") from None
        self.sealed_update.unlink()

    def _open(self) -> None:
        opened = self.inbox / f".{self.client}.opened"
        options = UnsealOptions(out=opened, key=self.key, verify_key=self.public, force=True)
        unseal(self.sealed_update, options)
        try:
            if not self._answers(opened):
                raise RefusedUpdate("it is the update of another proxy", where=opened)
            opened.rename(self.update)
        finally:
            shutil.rmtree(opened, ignore_errors=True)
