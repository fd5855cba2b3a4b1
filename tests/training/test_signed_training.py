"""client-train --verify-key and --sign: a proxy of the owner, and an update of the client."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

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
    common = {"data": home / "data.jsonl", **FAST}
    client_train(home / "proxy", home / "plain", **common)
    client_train(home / "proxy", home / "update", sign=home / "alice.key", verify_key=home / "owner.pub", **common)
    assert verify(home / "update", key=home / "alice.pub").files.keys() == {"update.json", "update.safetensors"}
    signed = contents(home / "update")
    del signed["model.sig"]
    assert signed == contents(home / "plain")


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
    with nothing_written(tmp_path), pytest.raises(InputError, match="--sign: is inside of the output"):
        client_train(
            home / "proxy", tmp_path / "out", data=home / "data.jsonl", sign=tmp_path / "out" / "alice.key", **FAST
        )
