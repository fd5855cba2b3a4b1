"""Key pairs, and what is signed with them, for tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedqsn_cli import keygen
from fedqsn_cli.artifacts.manifests import SIGNATURE, file_digest
from fedqsn_cli.crypto.attestation import folder_digest
from fedqsn_cli.crypto.keys import load_signing_key
from fedqsn_cli.crypto.signature import signed_bytes


@dataclass(frozen=True)
class Party:
    """Somebody with a key pair."""

    private: Path
    public: Path


def party(folder: Path, name: str) -> Party:
    """A new key pair."""
    made = keygen(folder / f"{name}.key")
    return Party(Path(made.private), Path(made.public))


def sign_folder(folder: Path, signer: Party) -> Path:
    """Sign what is in a folder now."""
    digests = {path.name: file_digest(path) for path in folder.iterdir() if path.name != SIGNATURE}
    (folder / SIGNATURE).write_bytes(signed_bytes(digests, load_signing_key(signer.private)))
    return folder


def digest_of(folder: Path) -> str:
    """The digest of a folder that an attestation names."""
    return folder_digest({path.name: file_digest(path) for path in folder.iterdir()})
