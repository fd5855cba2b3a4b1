"""Authenticated encryption of a stream for one recipient, in chunks: truncated, reordered or changed, it does not open.

    header    the line "fedqsn-sealed/1" and an ephemeral X25519 public key, 48 bytes
    key       HKDF-SHA256 of the shared secret; salt: ephemeral key, recipient's key
    chunk i   ChaCha20-Poly1305 of 1 MiB (the last one: what is left); nonce: i in 11 bytes, and 1 for the last chunk,
              else 0; associated data: the header

This is the STREAM construction (Hoang, Reyhanitabar, Rogaway, Vizár, "Online Authenticated-Encryption and its
Nonce-Reuse Misuse-Resistance", CRYPTO 2015). A key encrypts one stream, so nonces never repeat. The sender stays
anonymous: what is inside must be signed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedqsn_cli.errors import FormatError

MAGIC = b"fedqsn-sealed/1\n"
CHUNK = 1 << 20
TAG = 16
_HEADER = len(MAGIC) + 32


def encrypt(plain: Iterable[bytes], recipient: X25519PublicKey, chunk_bytes: int = CHUNK) -> Iterator[bytes]:
    """Encrypt a stream; yields header and chunks.

    Args:
        plain: pieces of any size.
        chunk_bytes: of each chunk but the last; `decrypt` must be given the same.
    """
    ephemeral = X25519PrivateKey.generate()
    header = MAGIC + ephemeral.public_key().public_bytes_raw()
    cipher = _cipher(ephemeral.exchange(recipient), header, recipient)
    yield header
    for number, chunk, last in _marked(_chunks(plain, chunk_bytes)):
        yield cipher.encrypt(_nonce(number, last), chunk, header)


def decrypt(
    read: Callable[[int], bytes], key: X25519PrivateKey, where: object, chunk_bytes: int = CHUNK
) -> Iterator[bytes]:
    """Decrypt a stream; yields verified chunks. What was yielded counts only when the last chunk was, too.

    Args:
        read: reads so many bytes, fewer at the end only.

    Raises:
        FormatError: it is not such a stream, is for another key, or was cut or changed.
    """
    header = read(_HEADER)
    if len(header) < _HEADER or not header.startswith(MAGIC):
        raise FormatError("is not a sealed folder", where=where)
    try:
        shared = key.exchange(X25519PublicKey.from_public_bytes(header[len(MAGIC) :]))
    except ValueError:  # a point of small order: the secret would be known to everybody
        raise _refused(where) from None
    cipher = _cipher(shared, header, key.public_key())
    for number, chunk, last in _marked(iter(lambda: read(chunk_bytes + TAG), b"")):
        try:
            yield cipher.decrypt(_nonce(number, last), chunk, header)
        except InvalidTag:
            raise _refused(where) from None


def _refused(where: object) -> FormatError:
    return FormatError("does not open: it was sealed for another key, cut off, or changed", where=where)


def _cipher(shared: bytes, header: bytes, recipient: X25519PublicKey) -> ChaCha20Poly1305:
    salt = header[len(MAGIC) :] + recipient.public_bytes_raw()
    return ChaCha20Poly1305(HKDF(hashes.SHA256(), 32, salt, MAGIC).derive(shared))


def _nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([last])


def _marked(chunks: Iterator[bytes]) -> Iterator[tuple[int, bytes, bool]]:
    """Each chunk with its number, and whether it is the last one. An empty stream is one empty chunk."""
    number, held = 0, next(chunks, b"")
    for chunk in chunks:
        yield number, held, False
        number, held = number + 1, chunk
    yield number, held, True


def _chunks(pieces: Iterable[bytes], size: int) -> Iterator[bytes]:
    """The same bytes in chunks of one size, the last one shorter. Each byte is copied once."""
    held, length = list[memoryview](), 0
    for piece in pieces:
        view = memoryview(piece)
        while length + len(view) >= size:
            cut = size - length
            yield b"".join([*held, view[:cut]])
            held, length, view = [], 0, view[cut:]
        if len(view):
            held.append(view)
            length += len(view)
    if held:
        yield b"".join(held)
