"""model.sig: who made the files of a folder, as OpenSSF model signing writes it.

A Sigstore bundle with an envelope (`dsse`) whose statement lists the SHA-256 of every other file; the reference tool
verifies it (`model_signing verify key`). The subject, the folder's name there, is always `model`: folders are called by
the names of clients. Subject digest: SHA-256 of all digests, in the order of the names.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedqsn_cli import strictjson
from fedqsn_cli.artifacts.manifests import SIGNATURE, file_digest
from fedqsn_cli.checkpoint import ArtifactWriter
from fedqsn_cli.checkpoint.files import read_file
from fedqsn_cli.checkpoint.header import is_plain_file_name
from fedqsn_cli.crypto import dsse
from fedqsn_cli.crypto.keys import SigningKey, VerifyKey, fingerprint
from fedqsn_cli.errors import FormatError, SignatureError

BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PREDICATE = "https://model_signing/signature/v1.0"

_SERIALIZATION = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": []}


def sign_artifacts(key: SigningKey, writers: Iterable[ArtifactWriter]) -> None:
    """Add to each folder the signature of everything that its writer has written. Only `publish` may follow."""
    for writer in writers:
        writer.add_bytes(SIGNATURE, signed_bytes(writer.digests, key))


def verify_folder(folder: Path, key: VerifyKey, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Check that a folder holds exactly the files that the owner of a key signed. Returns their digests.

    Args:
        known: digests of files that were computed already, or will be compared with the files later.

    Raises:
        SignatureError: there is no signature, it is of another key, or it is of other files.
        FormatError: the signature is malformed.
    """
    path = folder / SIGNATURE
    known = known or {}
    signed = _resources(signed_statement(path, key)[0], path)
    names = {entry.name for entry in os.scandir(folder)} - {SIGNATURE}
    for name in sorted(names - signed.keys()):
        raise SignatureError("is not among the files that were signed", where=folder / name)
    for name, digest in sorted(signed.items()):
        if name not in names:
            raise SignatureError("was signed, but is missing", where=folder / name)
        if (known.get(name) or file_digest(folder / name)) != digest:
            raise SignatureError("is not the file that was signed (SHA-256 differs)", where=folder / name)
    return signed


def signed_statement(path: Path, key: VerifyKey) -> tuple[dict[str, Any], bytes]:
    """The verified statement of a model.sig, and its signature. Raises SignatureError, FormatError."""
    if not os.path.lexists(path):
        raise SignatureError("is not signed", where=path.parent, hint=f"there is no {SIGNATURE} in it")
    document = strictjson.loads(read_file(path, dsse.LARGEST), path)
    if not isinstance(document, dict) or document.get("mediaType") != BUNDLE:
        raise FormatError(f"is not a {BUNDLE}", where=path)
    if _hint(document, path) not in (None, fingerprint(key)):
        raise SignatureError("was signed with another key", where=path)
    return dsse.opened(document.get("dsseEnvelope"), key, PREDICATE, path)


def _hint(document: dict[str, Any], where: Path) -> object:
    """The key that a bundle names, if it names one. Raises FormatError."""
    try:
        return document["verificationMaterial"]["publicKey"].get("hint")
    except (KeyError, TypeError, AttributeError):
        raise FormatError("does not say what it was signed with", where=where) from None


def expected_bytes(digests: Mapping[str, str], signature: bytes, key: VerifyKey) -> bytes:
    """The one model.sig that fedqsn writes for these files, given the signature in it.

    Args:
        digests: SHA-256 of all files of the folder but model.sig.
    """
    return bundle_bytes(_payload(digests), signature, key)


def signed_bytes(digests: Mapping[str, str], key: SigningKey) -> bytes:
    """The model.sig that fedqsn writes for these files with this key."""
    payload = _payload(digests)
    return bundle_bytes(payload, dsse.sign(payload, key), key.public_key())


def bundle_bytes(payload: bytes, signature: bytes, key: VerifyKey) -> bytes:
    """The text of a model.sig."""
    document = {
        "mediaType": BUNDLE,
        "verificationMaterial": {"publicKey": {"hint": fingerprint(key)}, "tlogEntries": []},
        "dsseEnvelope": dsse.envelope(payload, signature),
    }
    return strictjson.dumps(document).encode() + b"\n"


def _payload(digests: Mapping[str, str]) -> bytes:
    """The statement about files."""
    resources = [
        {"name": name, "algorithm": "sha256", "digest": digest}
        for name, digest in sorted(digests.items())
        if name != SIGNATURE
    ]
    subject = {"name": "model", "digest": {"sha256": _root([one["digest"] for one in resources])}}
    return dsse.statement([subject], PREDICATE, {"serialization": _SERIALIZATION, "resources": resources})


def _root(digests: list[str]) -> str:
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def _resources(told: dict[str, Any], where: Path) -> dict[str, str]:
    """The files of a statement and their digests. Raises FormatError."""
    try:
        listed = [(one["name"], one["digest"], one["algorithm"]) for one in told["predicate"]["resources"]]
        (subject,) = told["subject"]
        wanted = subject["digest"]["sha256"]
        found = _root([digest for _, digest, _ in listed])
        digests = {name: digest for name, digest, _ in listed}
    except (KeyError, TypeError, ValueError):
        raise FormatError("the signed statement does not list files", where=where) from None
    if any(algorithm != "sha256" for *_, algorithm in listed) or found != wanted or len(digests) < len(listed):
        raise FormatError("the signed statement contradicts itself, or uses other digests than SHA-256", where=where)
    for name in digests:
        if not is_plain_file_name(name):
            raise FormatError("the signed statement lists a file outside of the folder", where=where)
    return digests
