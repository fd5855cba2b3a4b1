"""client-train --verify-key and --sign: a proxy of the owner, and an update of the client."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from blake3 import blake3

from fedqsn_cli import client_train, verify
from fedqsn_cli.errors import InputError, SignatureError
from support.helpers import contents, nothing_written
from support.signing import party, sign_folder
from support.training_jobs import labelled, make_proxy, small_model

FAST = {"max_steps": 2, "batch_size": 4}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed proxy, data, and the keys of owner and client."""
    home = tmp_path_factory.mktemp("signed")
    owner = party(home, "owner")
    party(home, "alice")
    make_proxy(small_model(home / "model"), home / "proxy", sign=owner.private)
    labelled(home / "data.jsonl")
    return home


def test_an_update_is_signed_and_otherwise_the_same(home: Path) -> None:
    """But for the digest of its tensors: other programs check one that is signed, and they know SHA-256."""
    common = {"data": home / "data.jsonl", **FAST}
    client_train(home / "proxy", home / "plain", **common)
    client_train(home / "proxy", home / "update", sign=home / "alice.key", verify_key=home / "owner.pub", **common)
    assert verify(home / "update", key=home / "alice.pub").files.keys() == {"update.json", "update.safetensors"}
    signed, plain = contents(home / "update"), contents(home / "plain")
    del signed["model.sig"]
    data = signed["update.safetensors"]
    by_sha256, by_blake3 = (json.loads(update.pop("update.json")) for update in (signed, plain))
    assert signed == plain
    assert by_sha256.pop("files") == {"update.safetensors": hashlib.sha256(data).hexdigest()}
    assert by_blake3.pop("files") == {"update.safetensors": f"blake3:{blake3(data).hexdigest()}"}
    assert by_sha256 == by_blake3


def test_a_proxy_of_somebody_else_is_not_trained(home: Path, tmp_path: Path) -> None:
    eve = party(tmp_path, "eve")
    fake = tmp_path / "proxy"
    shutil.copytree(home / "proxy", fake)
    common = {"data": home / "data.jsonl", "verify_key": home / "owner.pub", **FAST}
    sign_folder(fake, eve)
    with nothing_written(tmp_path), pytest.raises(SignatureError, match="another key"):
        client_train(fake, tmp_path / "update", **common)
    (fake / "model.sig").unlink()
    with nothing_written(tmp_path), pytest.raises(SignatureError, match="is not signed"):
        client_train(fake, tmp_path / "update", **common)


def test_a_private_key_is_not_sent(home: Path, tmp_path: Path) -> None:
    with nothing_written(tmp_path), pytest.raises(InputError, match="--sign: is inside of "):
        client_train(
            home / "proxy", tmp_path / "out", data=home / "data.jsonl", sign=tmp_path / "out" / "alice.key", **FAST
        )
