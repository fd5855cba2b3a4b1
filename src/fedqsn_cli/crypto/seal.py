"""`seal` and `unseal`: a proxy or update as one file that only its recipient can open."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from fedqsn_cli import validate
from fedqsn_cli.artifacts.manifests import PROXY_MANIFEST, SIGNATURE, UPDATE_MANIFEST
from fedqsn_cli.checkpoint import ArtifactWriter
from fedqsn_cli.checkpoint.files import open_regular_file, stream_new_file
from fedqsn_cli.checkpoint.in_order import InOrderReader
from fedqsn_cli.crypto import stream
from fedqsn_cli.crypto.folder import folder_stream, write_folder
from fedqsn_cli.crypto.keys import VerifyKey, load_opening_key, load_recipient, load_verify_key
from fedqsn_cli.crypto.signature import verify_folder
from fedqsn_cli.errors import FormatError, InputError, SignatureError
from fedqsn_cli.options import SealOptions, UnsealOptions

_SENT = (PROXY_MANIFEST, UPDATE_MANIFEST)


@dataclass(frozen=True, slots=True)
class Sealed:
    """The result of `seal`: a file, and its size."""

    path: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Unsealed:
    """The result of `unseal`.

    Args:
        path: the folder. verified: whether its signature was checked.
    """

    path: str
    verified: bool


def seal(path: str | Path, options: SealOptions) -> Sealed:
    """Encrypt a proxy or an update for one recipient: X25519, HKDF-SHA256 and ChaCha20-Poly1305 in chunks.

    Nobody else can read it, not even the sender. Sealing twice gives different bytes.

    Args:
        path: the folder.
        options: see `SealOptions`.

    Raises:
        InputError: it is neither a proxy nor an update, or holds something that an export does not write.
        KeyFileError: the recipient's key cannot be used. OutputExists: `out` exists.

    Example:
        >>> seal("proxies/alice", "alice.sealed", to="alice.pub").bytes
    """
    folder, out = Path(validate.here(path, "PATH")), Path(options.out)
    pieces = sealed_pieces(folder, load_recipient(options.to))
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):
        raise InputError("is inside of the folder that is sealed", where="--out", hint="write it elsewhere")
    stream_new_file(out, pieces)
    return Sealed(str(out), out.stat().st_size)


def sealed_pieces(folder: Path, recipient: X25519PublicKey, digests: dict[str, str] | None = None) -> Iterator[bytes]:
    """The bytes of a sealed proxy or update, each read and encrypted when it is asked for.

    Args:
        digests: receives the SHA-256 of each file, of the bytes that were sealed.

    Raises:
        InputError: the folder is neither, or holds something that an export does not write.
    """
    if not any(os.path.isfile(folder / name) for name in _SENT):
        hint = "models and keys of the owner are not sealed: they are not to be sent"
        raise InputError("is neither a proxy nor an update", where=folder, hint=hint)
    return stream.encrypt(folder_stream(folder, digests), recipient)


def unseal(path: str | Path, options: UnsealOptions) -> Unsealed:
    """Open a sealed folder; it appears complete, or not at all.

    Args:
        path: the sealed file.
        options: see `UnsealOptions`.

    Raises:
        FormatError: it is for another key, or was cut off or changed. SignatureError: with `verify_key`, the folder is
            not signed with it. KeyFileError: a key cannot be used. OutputExists: `out` exists.

    Example:
        >>> unseal("alice.sealed", "proxy", key="alice.key", verify_key="owner.pub").verified
        True
    """
    source = Path(validate.here(path, "FILE"))
    sender = load_verify_key(options.verify_key) if options.verify_key is not None else None
    key = load_opening_key(options.key)
    with ArtifactWriter(Path(options.out), force=options.force, replaces=_SENT, uniform=True) as writer:
        with open(open_regular_file(source), "rb", buffering=0) as file:
            write_folder(stream.decrypt(InOrderReader(file.fileno()).read, key, source), writer, source)
        if not any(name in writer.digests for name in _SENT):
            raise FormatError("holds neither a proxy nor an update", where=source)
        if sender is not None:
            _verify(writer.place(SIGNATURE).parent, sender, writer.digests, source)
        return Unsealed(str(writer.publish()), sender is not None)


def _verify(folder: Path, sender: VerifyKey, digests: Mapping[str, str], source: Path) -> None:
    """Verify the signature of an opened folder; errors name the sealed file, since the folder will be gone."""
    try:
        verify_folder(folder, sender, digests)
    except (SignatureError, FormatError) as error:
        error.where = str(error.where).replace(str(folder), str(source), 1)
        raise
