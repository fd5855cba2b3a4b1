"""merge --verify-key: an update counts only if the client who got its proxy signed it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fedqsn_cli import export_proxy, merge
from fedqsn_cli.errors import InputError, KeyFileError, RefusedUpdate
from support.helpers import make_model, nothing_written, send
from support.signing import Party, party, sign_folder

CLIENTS = ("alice", "bob")


@pytest.fixture
def round_one(tmp_path: Path) -> dict[str, Party]:
    """Proxies of two clients, and an update of each that is signed."""
    model = make_model(tmp_path / "model", "bert")
    export_proxy(
        model, tmp_path / "proxies/{client}", client=CLIENTS, round=1, key=tmp_path / "key", ledger=tmp_path / "ledger",
        p1=0.1, p2=0.1, format="none",
    )  # fmt: skip
    people = {name: party(tmp_path, name) for name in CLIENTS}
    for name, who in people.items():
        sign_folder(send(tmp_path / "proxies" / name, tmp_path / "updates" / name), who)
    return people


def merged(home: Path, **options: Any) -> Any:
    given = {"key": home / "key", "ledger": home / "ledger", "verify_key": home / "{client}.pub", **options}
    return merge(home / "model", [home / "updates" / name for name in CLIENTS], home / "next", **given)


@pytest.mark.usefixtures("round_one")
def test_updates_of_their_clients_are_merged(tmp_path: Path) -> None:
    assert [client.client for client in merged(tmp_path).clients] == ["alice", "bob"]


def test_an_update_that_another_client_sent_is_refused(tmp_path: Path, round_one: dict[str, Party]) -> None:
    shutil.rmtree(tmp_path / "updates/alice")
    sign_folder(send(tmp_path / "proxies/alice", tmp_path / "updates/alice"), round_one["bob"])  # who has her proxy
    with nothing_written(tmp_path), pytest.raises(RefusedUpdate, match="that of client 'alice', who must sign"):
        merged(tmp_path)


@pytest.mark.usefixtures("round_one")
def test_an_unsigned_and_a_changed_update_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "updates/bob/update.json"
    path.write_bytes(path.read_bytes().replace(b'"num_examples": ', b'"num_examples": 1'))
    with nothing_written(tmp_path), pytest.raises(RefusedUpdate, match="not the file that was signed"):
        merged(tmp_path)
    (tmp_path / "updates/bob/model.sig").unlink()
    with nothing_written(tmp_path), pytest.raises(RefusedUpdate, match="is not signed"):
        merged(tmp_path)
    assert merged(tmp_path, verify_key=None).clients  # nobody asked


@pytest.mark.usefixtures("round_one")
def test_tensors_that_were_exchanged_are_refused(tmp_path: Path) -> None:
    """Their digest is compared with the signed one while they are merged."""
    for name in CLIENTS:
        shutil.copy(tmp_path / "updates" / name / "update.safetensors", tmp_path / f"{name}.safetensors")
    path = tmp_path / "updates/alice/update.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with nothing_written(tmp_path), pytest.raises(RefusedUpdate, match="digest is not the one in update.json"):
        merged(tmp_path)


@pytest.mark.usefixtures("round_one")
def test_a_key_is_needed_for_every_client(tmp_path: Path) -> None:
    with nothing_written(tmp_path), pytest.raises(InputError, match="is the same for several clients"):
        merged(tmp_path, verify_key=tmp_path / "alice.pub")
    with nothing_written(tmp_path), pytest.raises(InputError, match="there is no such file"):
        merged(tmp_path, verify_key=tmp_path / "keys/{client}.pub")
    with nothing_written(tmp_path), pytest.raises(KeyFileError, match="is a private key"):
        merged(tmp_path, verify_key=tmp_path / "{client}.key")
    with pytest.raises(InputError, match="a restore takes no updates"):
        merged(tmp_path, restore=tmp_path / "model")
