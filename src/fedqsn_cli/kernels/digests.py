"""The digests that fedqsn records of much data, and how they are written.

A SHA-256 is 64 hexadecimal digits, a BLAKE3 "blake3:" and 64 such digits. BLAKE3 is as safe and several times as fast,
so it stands for what only fedqsn compares: models and updates. What people and other programs check has SHA-256: the
files of a proxy, and everything that is signed.
"""

from __future__ import annotations

import hashlib
from typing import Literal, Protocol

from blake3 import blake3

Algorithm = Literal["blake3", "sha256"]
_PREFIXES: dict[Algorithm, str] = {"blake3": "blake3:", "sha256": ""}


class Hash(Protocol):
    """A digest that is being computed."""

    def update(self, data: bytes | memoryview, /) -> object:
        """Take more bytes."""

    def hexdigest(self) -> str:
        """The digest of all bytes so far."""


def new_hash(algorithm: Algorithm) -> Hash:
    """Begin a digest."""
    return blake3() if algorithm == "blake3" else hashlib.sha256()


def written(algorithm: Algorithm, digest: Hash) -> str:
    """A digest as it is recorded."""
    return f"{_PREFIXES[algorithm]}{digest.hexdigest()}"


def algorithm_of(recorded: str | None) -> Algorithm:
    """The algorithm of a recorded digest, for one that is compared with it; None: there is no record."""
    return "blake3" if recorded is None or recorded.startswith(_PREFIXES["blake3"]) else "sha256"
