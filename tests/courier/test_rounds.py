"""What the owner takes for an answer: of the client whom the ledger names, for the proxy that was sent."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fedqsn_cli import export_proxy, seal
from fedqsn_cli.artifacts import ledger
from fedqsn_cli.courier.layout import Owner
from fedqsn_cli.courier.recipe import Recipe
from fedqsn_cli.courier.rounds import Delivery, deliveries
from fedqsn_cli.crypto.keys import load_signing_key
from fedqsn_cli.errors import InputError, RefusedUpdate
from support.helpers import contents, make_model, send
from support.signing import Party, party, sign_folder

RECIPE = Recipe(1.0, 1e-3, 8, "fp32")


@pytest.fixture
def people(tmp_path: Path) -> dict[str, Party]:
    """A courier's folder with two clients who have joined, and their proxies."""
    home = tmp_path / "courier"
    for name in ("ca", "keys", "carried"):
        (home / name).mkdir(parents=True)
    made = {name: party(tmp_path, name) for name in ("owner", "alice", "bob")}
    for name in ("alice", "bob"):
        shutil.copy(made[name].public, home / "keys" / f"{name}.pub")
    model = make_model(tmp_path / "model", "bert")
    export_proxy(
        model, tmp_path / "out/{client}", client=["alice", "bob"], round=1, key=tmp_path / "key",
        ledger=tmp_path / "ledger", p1=0.1, p2=0.1, format="none", sign=made["owner"].private,
    )  # fmt: skip
    return made


def errands_of(home: Path, *folders: Path) -> dict[str, Delivery]:
    releases = ledger.read(home / "ledger")
    key = load_signing_key(home / "owner.key")
    made = deliveries(Owner.open(home / "courier"), folders, home / "in", releases, RECIPE, key)
    return {delivery.client: delivery for delivery in made}


def both(home: Path) -> dict[str, Delivery]:
    return errands_of(home, home / "out/alice", home / "out/bob")


def reply(delivery: Delivery, signer: Party, to: Party, proxy: Path | None = None) -> None:
    """An update as it comes back sealed."""
    folder = send(proxy or delivery.folder, delivery.carried.with_name("update"))
    seal(sign_folder(folder, signer), delivery.sealed_update, to=to.public)
    shutil.rmtree(folder)


def test_the_ledger_says_whom_a_proxy_is_for_whatever_its_folder_is_called(
    tmp_path: Path, people: dict[str, Party]
) -> None:
    (tmp_path / "out/alice").rename(tmp_path / "out/x")
    (tmp_path / "out/bob").rename(tmp_path / "out/alice")
    made = errands_of(tmp_path, tmp_path / "out/x", tmp_path / "out/alice")
    assert made["alice"].folder.name == "x" and made["bob"].folder.name == "alice"
    for delivery in made.values():
        delivery.prepare()
    first = made["alice"].sealed_proxy.read_bytes()
    made["alice"].prepare()
    assert made["alice"].sealed_proxy.read_bytes() == first  # sealed once: an interrupted transfer goes on
    assert first != made["bob"].sealed_proxy.read_bytes()


def test_an_answer_of_its_client_is_taken(tmp_path: Path, people: dict[str, Party]) -> None:
    delivery = both(tmp_path)["alice"]
    reply(delivery, people["alice"], people["owner"])
    delivery.take(tmp_path / "owner.key")
    assert delivery.done and "update.json" in contents(tmp_path / "in/alice")
    assert not delivery.sealed_update.exists()


@pytest.mark.parametrize(
    ("signer", "to", "proxy", "why"),
    [
        ("bob", "owner", None, "another key"),  # bob answers for alice
        ("alice", "bob", None, "sealed for another key"),
        ("alice", "owner", "out/bob", "update of another proxy"),  # swapped, or of another round
    ],
)
def test_another_answer_is_refused(
    tmp_path: Path, people: dict[str, Party], signer: str, to: str, proxy: str | None, why: str
) -> None:
    delivery = both(tmp_path)["alice"]
    reply(delivery, people[signer], people[to], tmp_path / proxy if proxy else None)
    with pytest.raises(RefusedUpdate, match=why):
        delivery.take(tmp_path / "owner.key")
    assert not delivery.done and not delivery.sealed_update.exists()


def test_a_byte_that_the_courier_changed_is_found(tmp_path: Path, people: dict[str, Party]) -> None:
    delivery = both(tmp_path)["alice"]
    reply(delivery, people["alice"], people["owner"])
    data = bytearray(delivery.sealed_update.read_bytes())
    data[len(data) // 2] ^= 1
    delivery.sealed_update.write_bytes(data)
    with pytest.raises(RefusedUpdate, match="cut off, or changed"):
        delivery.take(tmp_path / "owner.key")


def test_a_proxy_that_is_not_in_the_ledger_or_of_a_stranger_is_not_sent(
    tmp_path: Path, people: dict[str, Party]
) -> None:
    (tmp_path / "courier/keys/bob.pub").unlink()
    with pytest.raises(InputError, match="client 'bob' has not joined"):
        both(tmp_path)
    with pytest.raises(InputError, match="two proxies are for client 'alice'"):
        errands_of(tmp_path, tmp_path / "out/alice", tmp_path / "out/alice")
    path = tmp_path / "out/alice/proxy.json"
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(InputError, match="no proxy of this ledger"):
        errands_of(tmp_path, tmp_path / "out/alice")


def test_a_folder_that_is_no_courier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not the owner's folder"):
        Owner.open(tmp_path)
