"""A party's key pair: one P-256 key that signs, and one X25519 key that opens what was sealed for the party.

The private file (mode 0600) and the public one are PEM files of two blocks each, PKCS#8 and SubjectPublicKeyInfo. A
file with the P-256 block alone, as `openssl ecparam -name prime256v1 -genkey` makes it, signs and verifies too.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from fedqsn_cli import validate
from fedqsn_cli.checkpoint.files import read_file, write_file_atomically
from fedqsn_cli.checkpoint.secret_files import create_secret, read_secret
from fedqsn_cli.errors import KeyFileError, OutputExists
from fedqsn_cli.options import KeygenOptions

SigningKey = ec.EllipticCurvePrivateKey
VerifyKey = ec.EllipticCurvePublicKey

_LIMIT = 1 << 16  # bytes of a key file
_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----.*?-----END \1-----\s*", re.DOTALL)
_PRIVATE, _PUBLIC = b"PRIVATE KEY", b"PUBLIC KEY"
_MAKE_ONE = "make a key pair with 'fedqsn keygen'"
_PEM, _SPKI = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo


@dataclass(frozen=True, slots=True)
class KeyPair:
    """The result of `keygen`.

    Args:
        private, public: the files. fingerprint: SHA-256 of the public signing key, as signatures name it.
    """

    private: str
    public: str
    fingerprint: str


def keygen(path: str | Path, options: KeygenOptions) -> KeyPair:
    """Make a key pair: a private file for its owner alone, and a public one for everybody who deals with them.

    Args:
        path: the private file.
        options: see `KeygenOptions`.

    Raises:
        OutputExists: a file is already there; keys are never replaced. InputError: the place cannot be written.

    Example:
        >>> keygen("alice.key").public
        'alice.pub'
    """
    private, public = Path(validate.here(path, "KEY")), options.public_file(path)
    if os.path.lexists(public):
        raise OutputExists("already exists", where=public, hint="keys are never replaced; choose another name")
    signing, sealing = ec.generate_private_key(ec.SECP256R1()), X25519PrivateKey.generate()
    try:
        create_secret(private, _private_pem(signing) + _private_pem(sealing))
    except FileExistsError:
        raise OutputExists(
            "already exists", where=private, hint="keys are never replaced; choose another name"
        ) from None
    try:
        write_file_atomically(public, public_pem(signing.public_key()) + public_pem(sealing.public_key()))
    except BaseException:  # a private key without its public one is of no use, and would be in the way of the next try
        private.unlink()
        raise
    return KeyPair(str(private), str(public), fingerprint(signing.public_key()))


def load_signing_key(path: str | Path) -> SigningKey:
    """The P-256 key of a private file.

    Raises:
        KeyFileError: it is missing, open to others, protected with a password, or has no such key.
    """
    key: SigningKey = _only(_private_keys(path), SigningKey, "P-256 key to sign with", path)
    _require_p256(key.curve, path)
    return key


def load_opening_key(path: str | Path) -> X25519PrivateKey:
    """The X25519 key of a private file. Raises KeyFileError, as `load_signing_key`."""
    key: X25519PrivateKey = _only(_private_keys(path), X25519PrivateKey, "X25519 key to open with", path)
    return key


def load_verify_key(path: str | Path) -> VerifyKey:
    """The P-256 key of a public file. Raises KeyFileError: it has none."""
    key: VerifyKey = _only(_public_keys(path), VerifyKey, "public P-256 key", path)
    _require_p256(key.curve, path)
    return key


def load_recipient(path: str | Path) -> X25519PublicKey:
    """The X25519 key of a public file. Raises KeyFileError: it has none."""
    key: X25519PublicKey = _only(_public_keys(path), X25519PublicKey, "public X25519 key to seal for", path)
    return key


def fingerprint(key: VerifyKey) -> str:
    """SHA-256 of the PEM text of a public signing key, in hexadecimal: its name in signatures."""
    return hashlib.sha256(public_pem(key)).hexdigest()


def public_pem(key: VerifyKey | X25519PublicKey) -> bytes:
    """SubjectPublicKeyInfo in PEM."""
    return key.public_bytes(_PEM, _SPKI)


def _private_pem(key: SigningKey | X25519PrivateKey) -> bytes:
    return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _private_keys(path: str | Path) -> list[Any]:
    data = read_secret(path, _LIMIT, _PRIVATE)
    return _keys(data, _PRIVATE, lambda pem: serialization.load_pem_private_key(pem, None), path)


def _public_keys(path: str | Path) -> list[Any]:
    return _keys(read_file(Path(path), _LIMIT), _PUBLIC, serialization.load_pem_public_key, path)


def _keys(data: bytes, label: bytes, load: Callable[[bytes], Any], path: str | Path) -> list[Any]:
    """The keys of all blocks with such a label; others, such as the parameters of a curve, are left out."""
    found = [(match[0], match[1]) for match in _BLOCK.finditer(data)]
    blocks = [block for block, kind in found if kind.endswith(label)]
    if not blocks and any(kind.endswith((_PRIVATE, _PUBLIC)) for _, kind in found):
        given, needed = ("public", "private") if label == _PRIVATE else ("private", "public")
        raise KeyFileError(f"is a {given} key", where=path, hint=f"give the {needed} one of the pair")
    try:
        return [load(block) for block in blocks]
    except TypeError:
        raise KeyFileError("is protected with a password", where=path, hint="give a key without one") from None
    except (ValueError, UnsupportedAlgorithm):
        raise KeyFileError("is not a valid key in PEM", where=path, hint=_MAKE_ONE) from None


def _only(keys: list[Any], kind: Any, what: str, path: str | Path) -> Any:
    """The one key of a class, which may be abstract. Raises KeyFileError."""
    found = [key for key in keys if isinstance(key, kind)]
    if len(found) != 1:
        raise KeyFileError(f"holds {'more than one' if found else 'no'} {what}", where=path, hint=_MAKE_ONE)
    return found[0]


def _require_p256(curve: ec.EllipticCurve, path: str | Path) -> None:
    if curve.name != ec.SECP256R1.name:
        raise KeyFileError(f"is a key of the curve {curve.name}, not of P-256", where=path, hint=_MAKE_ONE)
