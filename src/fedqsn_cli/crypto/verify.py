"""`verify`: is a folder, or the verdict of an audit, what the owner of a key signed?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedqsn_cli.checkpoint import resolve
from fedqsn_cli.crypto.attestation import read_attestation
from fedqsn_cli.crypto.keys import fingerprint, load_verify_key
from fedqsn_cli.crypto.signature import verify_folder
from fedqsn_cli.options import VerifyOptions


@dataclass(frozen=True, slots=True)
class Verified:
    """The result of `verify`.

    Args:
        kind: folder or attestation. signer: fingerprint of the key.
        files: signed files and their SHA-256; of an attestation, the proxies that were audited.
        verdict: of the audit; None for a folder.
    """

    path: str
    kind: str
    signer: str
    files: dict[str, str]
    verdict: str | None


def verify(path: str | Path, options: VerifyOptions) -> Verified:
    """Check that a proxy, an update or the attestation of an audit was signed with a key, and is unchanged.

    Args:
        path: a folder, an attestation, or an hf:// reference.
        options: see `VerifyOptions`.

    Raises:
        SignatureError: it is not signed, was signed with another key, or a file was changed, added or removed.
        FormatError: the signature is malformed. KeyFileError: the key cannot be used.

    Example:
        >>> verify("proxy/", key="owner.pub").signer
    """
    key = load_verify_key(options.key)
    found = resolve(str(path)).path
    if found.is_dir():
        return Verified(str(path), "folder", fingerprint(key), verify_folder(found, key), None)
    told = read_attestation(found, key)
    return Verified(str(path), "attestation", fingerprint(key), dict(told.proxies), told.verdict)
