"""What the strongroom packs, and what a host that has no secret takes it for."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from fedqsn_cli import courier_send, merge, unseal
from fedqsn_cli.courier.layout import Owner
from fedqsn_cli.courier.outbox import read_outbox
from fedqsn_cli.courier.parts import Parts
from fedqsn_cli.courier.work import SiteRound
from fedqsn_cli.crypto.keys import load_verify_key
from fedqsn_cli.errors import FormatError, GateFailed, InputError, OutputExists, SignatureError
from support.courier import CLIENTS, Carrier, Desk, copied_host
from support.helpers import contents, nothing_written
from support.signing import party

_opened: list[str] | None = None  # what is opened while a test listens


def _listen(event: str, arguments: tuple[object, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], str | bytes | Path):
        _opened.append(str(arguments[0]))


def test_the_ledger_says_whom_a_proxy_is_for_whatever_its_folder_is_called(desk: Desk) -> None:
    desk.proxy("alice").rename(desk.home / "x")
    desk.proxy("bob").rename(desk.home / "out-1/alice")
    outbox = desk.pack("outbox", desk.home / "x", desk.home / "out-1/alice", epochs=2.0, method="lora", lora_r=4)
    assert set(contents(outbox)) == {"alice.order", "alice.proxy", "bob.order", "bob.proxy", "audit.intoto.json"}
    owner = load_verify_key(desk.key.public)
    for sent in read_outbox(outbox, owner):
        unseal(sent.sealed, desk.home / sent.order.client, key=desk.site(sent.order.client).private_key)
        manifest = contents(desk.home / sent.order.client)["proxy.json"]
        assert manifest == contents(desk.home / ("x" if sent.order.client == "alice" else "out-1/alice"))["proxy.json"]
        assert sent.order.sealed == Parts.of(sent.sealed)
        assert sent.order.proposal.words() == [
            "--method=lora", "--lora-r=4", "--epochs=2.0", "--lr=5e-05", "--batch-size=16", "--update-format=fp32",
        ]  # fmt: skip


def test_an_outbox_names_no_path_and_holds_no_key_and_no_weight(desk: Desk) -> None:
    weights = (desk.proxy("alice") / "visible.safetensors").read_bytes()[-40:]
    for data in contents(desk.pack()).values():
        assert weights not in data and b"PRIVATE" not in data and str(desk.home).encode() not in data


def test_what_was_not_audited_or_changed_since_is_not_packed(desk: Desk) -> None:
    (desk.home / "other.toml").write_text("")
    eve = party(desk.home, "eve")
    with nothing_written(desk.home.parent):
        with pytest.raises(InputError, match="another policy"):
            desk.pack(policy=desk.home / "other.toml")
        with pytest.raises(SignatureError, match="another key"):
            desk.pack(key=eve.private)
        with pytest.raises(InputError, match="two proxies are for client 'alice'"):
            desk.pack("outbox", desk.proxy("alice"), desk.proxy("alice"))
    desk.pack("taken")
    with pytest.raises(OutputExists):
        desk.pack("taken")
    (desk.proxy("bob") / "notes.txt").write_text("weights")
    with nothing_written(desk.home.parent), pytest.raises(SignatureError, match="not one of the folders that were aud"):
        desk.pack()
    desk.attest(1, "FAILED")
    with nothing_written(desk.home.parent), pytest.raises(GateFailed, match="did not pass"):
        desk.pack()


def test_a_proxy_that_is_not_in_the_ledger_or_of_a_stranger_is_not_packed(desk: Desk) -> None:
    path = desk.proxy("alice") / "proxy.json"
    before = path.read_bytes()
    path.write_bytes(before + b"\n")
    with nothing_written(desk.home.parent), pytest.raises(InputError, match="not a proxy of this ledger"):
        desk.pack()
    path.write_bytes(before)
    (desk.owner.home / "keys/bob.pub").unlink()
    with nothing_written(desk.home.parent), pytest.raises(InputError, match="client 'bob' has not joined"):
        desk.pack()
    with pytest.raises(InputError, match="not the owner's folder"):
        Owner.open(desk.home)


def test_options_that_do_not_go_together_are_refused_before_anything_is_sealed(desk: Desk) -> None:
    with pytest.raises(InputError, match="is for adapters"):
        desk.pack(lora_r=4)
    with pytest.raises(InputError, match="adapters are not sent as int8"):
        desk.pack(method="lora", update_format="int8")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda outbox: (outbox / "bob.proxy").write_bytes(b"x"), FormatError, "not the sealed proxy of its order"),
        (lambda outbox: (outbox / "bob.proxy").unlink(), InputError, "no such file"),
        (
            lambda outbox: (outbox / "bob.order").rename(outbox / "carol.order"),
            FormatError,
            "an order for client 'bob'",
        ),
        (lambda outbox: shutil.move(outbox / "bob.proxy", outbox / "alice.proxy"), FormatError, "not the sealed proxy"),
        (lambda outbox: (outbox / "audit.intoto.json").unlink(), InputError, "no such file"),
        (lambda outbox: (outbox / "bob.order").write_text("{}"), FormatError, "envelope"),
        (lambda outbox: [path.unlink() for path in outbox.glob("*.order")], InputError, "is not an outbox"),
    ],
)
def test_an_outbox_that_was_damaged_or_changed_on_its_way_is_refused(
    desk: Desk, damage: object, error: type[Exception], message: str
) -> None:
    outbox = desk.pack()
    damage(outbox)  # type: ignore[operator]
    with pytest.raises(error, match=message):
        read_outbox(outbox, load_verify_key(desk.key.public))


def test_a_host_refuses_what_the_owner_did_not_sign_and_what_was_not_audited(desk: Desk) -> None:
    outbox, owner = desk.pack(), load_verify_key(desk.key.public)
    with pytest.raises(SignatureError):
        read_outbox(outbox, load_verify_key(party(desk.home, "eve").public))
    other = desk.attest(1)
    told = json.loads(other.read_text())
    (outbox / "audit.intoto.json").write_text(json.dumps(told | {"signatures": [{"keyid": "", "sig": "MAA="}]}))
    with pytest.raises(SignatureError):
        read_outbox(outbox, owner)
    (desk.proxy("alice") / "notes.txt").write_text("x")  # a verdict on other folders
    shutil.copy(desk.attest(1), outbox / "audit.intoto.json")
    with pytest.raises(SignatureError, match="not one of the folders that were audited"):
        read_outbox(outbox, owner)
    shutil.copy(desk.attest(1, "FAILED"), outbox / "audit.intoto.json")
    with pytest.raises(GateFailed):
        read_outbox(outbox, owner)


def test_a_host_needs_nothing_that_is_private_and_the_strongroom_opens_what_comes_back(
    desk: Desk, carrier: Carrier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the host works, the strongroom does not exist; what it opens holds no private key but those of FLARE."""
    global _opened
    outbox, host = desk.pack(), copied_host(desk, tmp_path / "host")
    hidden = desk.home.rename(tmp_path / "elsewhere")
    begin, opened = SiteRound.of.__func__, []  # type: ignore[attr-defined]

    def site_works(cls: type[SiteRound], site: object, text: str) -> SiteRound:
        """From here to the end of the job, it is the site that opens files."""
        global _opened
        _opened = None
        return begin(cls, site, text)  # type: ignore[no-any-return]

    monkeypatch.setattr(SiteRound, "of", classmethod(site_works))
    submit = Carrier.submit

    def submitted(self: Carrier, job: Path) -> str:
        global _opened
        number = submit(self, job)
        _opened = opened
        return number

    monkeypatch.setattr(Carrier, "submit", submitted)
    sys.addaudithook(_listen)
    _opened = opened
    try:
        result = courier_send(host.home, outbox, into=tmp_path / "inbox", deadline="1m")
    finally:
        _opened = None
    assert result.arrived == 2 and any(path.endswith("alice.proxy") for path in opened)
    for path in (Path(path) for path in opened if path.startswith(str(tmp_path))):
        assert not path.is_relative_to(hidden) and "sites" not in path.parts
        assert not path.is_file() or b"PRIVATE KEY" not in path.read_bytes(), path
    assert set(contents(tmp_path / "inbox")) == {f"{name}.{kind}" for name in CLIENTS for kind in ("order", "update")}

    hidden.rename(desk.home)
    for name in CLIENTS:
        public = desk.owner.public_key(name)
        given = {"key": desk.key.private, "verify_key": public}
        unseal(tmp_path / f"inbox/{name}.update", desk.home / "updates" / name, **given)  # type: ignore[arg-type]
    merged = merge(
        desk.home / "model", [desk.home / "updates" / name for name in CLIENTS], desk.home / "next",
        verify_key=desk.owner.home / "keys/{client}.pub", **desk.secrets,
    )  # fmt: skip
    assert [client.client for client in merged.clients] == list(CLIENTS)
