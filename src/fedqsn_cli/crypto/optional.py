"""Signatures for commands that also work without: `cryptography`, which takes 10 MiB, is imported if a key is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from fedqsn_cli.checkpoint import ArtifactWriter


def signer(key: str | Path | None) -> Callable[[Iterable[ArtifactWriter]], None]:
    """What signs folders (`sign_artifacts`); it does nothing without a key. Raises KeyFileError."""
    if key is None:
        return lambda writers: None
    from fedqsn_cli.crypto.keys import load_signing_key
    from fedqsn_cli.crypto.signature import sign_artifacts

    return partial(sign_artifacts, load_signing_key(key))


def verify_signed(folder: Path, public: str | Path | None, known: Mapping[str, str]) -> None:
    """Check that a folder is as the owner of a public key signed it (`verify_folder`); nothing without a key.

    Raises:
        KeyFileError: the key cannot be used. SignatureError, FormatError: as from `verify_folder`.
    """
    if public is None:
        return
    from fedqsn_cli.crypto.keys import load_verify_key
    from fedqsn_cli.crypto.signature import verify_folder

    verify_folder(folder, load_verify_key(public), known)
