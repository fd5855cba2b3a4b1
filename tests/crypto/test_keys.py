"""Key files: what is made, what is taken from elsewhere, what is refused."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from fedqsn_cli import keygen
from fedqsn_cli.crypto import keys
from fedqsn_cli.errors import InputError, KeyFileError, OutputExists
from support.helpers import nothing_written
from support.signing import Party, party

PEM, PKCS8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
PLAIN = serialization.NoEncryption()


@pytest.fixture
def alice(tmp_path: Path) -> Party:
    return party(tmp_path, "alice")


def secret(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    path.chmod(0o600)
    return path


def test_a_pair_belongs_together_and_the_private_file_to_its_owner_alone(alice: Party) -> None:
    assert stat.S_IMODE(alice.private.stat().st_mode) == 0o600
    signing = keys.load_signing_key(alice.private).public_key()
    assert keys.fingerprint(signing) == keys.fingerprint(keys.load_verify_key(alice.public))
    opening = keys.load_opening_key(alice.private).public_key()
    assert keys.public_pem(opening) == keys.public_pem(keys.load_recipient(alice.public))
    assert b"PRIVATE" not in alice.public.read_bytes()


def test_keys_are_never_replaced(alice: Party) -> None:
    with nothing_written(alice.private.parent), pytest.raises(OutputExists, match="already exists"):
        keygen(alice.private)
    alice.public.unlink()
    with nothing_written(alice.private.parent), pytest.raises(OutputExists, match="already exists"):
        keygen(alice.private)


def test_the_public_key_is_not_written_over_the_private_one(tmp_path: Path) -> None:
    with nothing_written(tmp_path), pytest.raises(InputError, match="would be the private key"):
        keygen(tmp_path / "alice.pub")


def test_a_pair_whose_public_file_cannot_be_written_leaves_no_private_one(tmp_path: Path) -> None:
    with nothing_written(tmp_path), pytest.raises(InputError, match="there is no such folder"):
        keygen(tmp_path / "bob.key", public=tmp_path / "missing/bob.pub")


def test_a_private_key_that_others_can_read_is_refused(alice: Party) -> None:
    alice.private.chmod(0o640)
    with pytest.raises(KeyFileError, match="other users can open the key"):
        keys.load_signing_key(alice.private)


def test_a_key_of_openssl_signs(tmp_path: Path) -> None:
    made = subprocess.run(
        ["openssl", "ecparam", "-name", "prime256v1", "-genkey"], capture_output=True, check=True
    )  # with a block of parameters before it
    path = secret(tmp_path / "key.pem", made.stdout)
    assert keys.load_signing_key(path).curve.name == "secp256r1"
    with pytest.raises(KeyFileError, match="holds no X25519 key"):
        keys.load_opening_key(path)


def test_a_public_file_does_not_sign_and_a_private_one_does_not_verify(alice: Party) -> None:
    with pytest.raises(KeyFileError, match="is a private key; give the public one"):
        keys.load_verify_key(alice.private)
    with pytest.raises(KeyFileError, match="is a public key; give the private one"):
        keys.load_signing_key(secret(alice.public, alice.public.read_bytes()))


def test_other_keys_are_refused(tmp_path: Path, alice: Party) -> None:
    large = ec.generate_private_key(ec.SECP384R1()).private_bytes(PEM, PKCS8, PLAIN)
    with pytest.raises(KeyFileError, match="of the curve secp384r1"):
        keys.load_signing_key(secret(tmp_path / "large", large))
    other = rsa.generate_private_key(65537, 2048).private_bytes(PEM, PKCS8, PLAIN)
    with pytest.raises(KeyFileError, match="holds no P-256 key"):
        keys.load_signing_key(secret(tmp_path / "rsa", other))
    with pytest.raises(KeyFileError, match="holds more than one P-256 key"):
        keys.load_signing_key(secret(tmp_path / "two", 2 * alice.private.read_bytes()))
    locked = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        PEM, PKCS8, serialization.BestAvailableEncryption(b"word")
    )
    with pytest.raises(KeyFileError, match="holds no P-256 key|protected with a password"):
        keys.load_signing_key(secret(tmp_path / "locked", locked))


def test_garbage_is_refused(tmp_path: Path) -> None:
    broken = b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"
    with pytest.raises(KeyFileError, match="not a valid key"):
        keys.load_signing_key(secret(tmp_path / "broken", broken))
    with pytest.raises(KeyFileError, match="too large"):
        keys.load_signing_key(secret(tmp_path / "long", b"x" * 70_000))
    with pytest.raises(KeyFileError, match="there is no key"):
        keys.load_signing_key(tmp_path / "nowhere")
