"""What the owner takes for an answer: of the client whom the ledger names, for the proxy that was sent."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from fedqsn_cli import courier_send, seal
from fedqsn_cli.courier import rounds
from fedqsn_cli.courier import send as waiting
from fedqsn_cli.courier.outbox import read_outbox
from fedqsn_cli.courier.rounds import Opened, Sealed, Unreachable
from fedqsn_cli.crypto.keys import load_verify_key
from fedqsn_cli.errors import GateFailed, InputError, KeyFileError, RefusedUpdate
from support.courier import Carrier, Clock, Desk
from support.helpers import contents, nothing_written, send
from support.signing import Party, sign_folder


def deliveries(desk: Desk, number: int = 1, inbox: str = "in") -> dict[str, Opened]:
    """As `courier_send` makes them where the owner's key is."""
    place = desk.home.parent / inbox
    place.mkdir(exist_ok=True)
    return {one.client: one for one in deliveries_of(desk, desk.pack(f"outbox-{number}", number=number), place)}


def deliveries_of(desk: Desk, outbox: Path, inbox: Path = Path("in")) -> list[Opened]:
    """What is sent of an outbox."""
    owner, sent = desk.owner, read_outbox(outbox, load_verify_key(desk.key.public))
    key, carried = desk.key.private, owner.host.carried
    return [Opened(one, carried, inbox, key, owner.public_key(one.order.client)) for one in sent]


def party_of(desk: Desk, name: str) -> Party:
    return desk.key if name == "owner" else Party(desk.site(name).private_key, desk.site(name).home / "site.pub")


def reply(desk: Desk, delivery: Opened, signer: str, to: str, proxy: Path) -> None:
    """An update as it comes back sealed."""
    folder = sign_folder(send(proxy, desk.home / "update"), party_of(desk, signer))
    seal(folder, delivery.sealed_update, to=party_of(desk, to).public)
    shutil.rmtree(folder)


def test_an_answer_of_its_client_is_taken(desk: Desk) -> None:
    delivery = deliveries(desk)["alice"]
    reply(desk, delivery, "alice", "owner", desk.proxy("alice"))
    delivery.take()
    delivery.check()
    assert delivery.done and "update.json" in contents(delivery.update)
    assert not delivery.sealed_update.exists() and [path.name for path in delivery.inbox.iterdir()] == ["alice"]


def test_paths_may_be_relative(desk: Desk, carrier: Carrier, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox = desk.pack()
    monkeypatch.chdir(outbox.parent)
    owner, key = (os.path.relpath(path) for path in (desk.owner.home, desk.key.private))
    sent = courier_send(owner, outbox.name, into="in", key=key)
    assert sent.arrived == 2 and {path.name for path in (outbox.parent / "in").iterdir()} == {"alice", "bob"}


@pytest.mark.parametrize(
    ("signer", "to", "proxy", "why"),
    [
        ("bob", "owner", "out-1/alice", "another key"),  # bob answers for alice
        ("alice", "bob", "out-1/alice", "sealed for another key"),
        ("alice", "owner", "out-1/bob", "update of another proxy"),  # swapped
        ("alice", "owner", "out-2/alice", "update of another proxy"),  # replayed
    ],
)
def test_another_answer_is_refused(desk: Desk, signer: str, to: str, proxy: str, why: str) -> None:
    if "out-2" in proxy:
        desk.export(2)
    delivery = deliveries(desk)["alice"]
    reply(desk, delivery, signer, to, desk.home / proxy)
    with pytest.raises(RefusedUpdate, match=why):
        delivery.take()
    assert not delivery.done and not delivery.sealed_update.exists() and not list(delivery.inbox.iterdir())


def test_a_byte_that_the_host_changed_in_an_update_is_found(desk: Desk) -> None:
    delivery = deliveries(desk)["alice"]
    reply(desk, delivery, "alice", "owner", desk.proxy("alice"))
    data = bytearray(delivery.sealed_update.read_bytes())
    data[len(data) // 2] ^= 1
    delivery.sealed_update.write_bytes(data)
    with pytest.raises(RefusedUpdate, match="cut off, or changed"):
        delivery.take()


def test_an_answer_that_the_owner_cannot_open_now_is_kept(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the key or room on the disk, the fault is not the client's."""
    delivery = deliveries(desk)["alice"]
    reply(desk, delivery, "alice", "owner", desk.proxy("alice"))
    delivery.key.rename(desk.home / "elsewhere")
    with pytest.raises(KeyFileError):
        delivery.take()
    (desk.home / "elsewhere").rename(delivery.key)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(rounds, "unseal", full)
        delivery.take()
    assert not delivery.done
    delivery.take()
    assert delivery.done and not delivery.sealed_update.exists()


def test_of_two_who_send_a_proxy_at_once_one_is_refused(desk: Desk, carrier: Carrier) -> None:
    outbox, options = desk.pack(), {"into": desk.home / "in", "key": desk.key.private, "deadline": "1m"}
    (first, *_) = deliveries_of(desk, outbox)
    with first.alone():
        before = contents(desk.owner.host.carried)
        with pytest.raises(InputError, match="another 'fedqsn courier-send' sends this proxy"):
            courier_send(desk.owner.home, outbox, **options)
        assert not carrier.jobs and contents(desk.owner.host.carried) == before
    assert courier_send(desk.owner.home, outbox, **options).arrived == 2
    assert not list(desk.owner.host.carried.iterdir())


def test_the_key_of_somebody_else_is_refused_before_anything_is_sent(desk: Desk, carrier: Carrier) -> None:
    outbox, other = desk.pack(), desk.site("alice").private_key
    with nothing_written(desk.home), pytest.raises(InputError, match="not the key that updates are sealed for"):
        courier_send(desk.owner.home, outbox, into=desk.home / "in", key=other)
    assert not carrier.jobs


@pytest.mark.parametrize("inbox", ["file", "file/in", "/proc/in/box"])
def test_an_inbox_that_cannot_be_written_is_refused_before_anything_is_sent(
    desk: Desk, carrier: Carrier, inbox: str
) -> None:
    outbox = desk.pack()
    (desk.home / "file").touch()
    with nothing_written(desk.home), pytest.raises(InputError, match="give a folder for the updates of this round"):
        courier_send(desk.owner.home, outbox, into=desk.home / inbox, key=desk.key.private)
    assert not carrier.jobs


def test_a_disk_without_room_for_an_update_is_named(
    desk: Desk, carrier: Carrier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rounds, "unseal", full)
    with pytest.raises(OSError, match="No space left on device: '.*/in'"):
        courier_send(desk.owner.home, desk.pack(), into=desk.home / "in", key=desk.key.private)


def test_a_server_that_does_not_answer_is_asked_once_for_all_clients(
    desk: Desk, carrier: Carrier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt takes seconds: with many clients, the deadline would be long over."""
    asked = list[Path]()

    def silent(job: Path) -> str:
        asked.append(job)
        raise Unreachable("cannot connect")

    monkeypatch.setattr(carrier, "submit", silent)
    monkeypatch.setattr(waiting, "time", Clock(looks=0))
    with pytest.raises(GateFailed, match="0 of 2 updates came in time"):
        courier_send(desk.owner.home, desk.pack(), into=desk.home / "in", key=desk.key.private)
    assert len(asked) == 1


@pytest.mark.parametrize("key", ["with the key", None])
def test_an_inbox_that_holds_something_else_is_refused_before_anything_is_sent(
    desk: Desk, carrier: Carrier, key: str | None
) -> None:
    outbox, options = desk.pack(), {"deadline": "1m", "key": desk.key.private if key else None}
    for number, name in enumerate(("alice", "alice.update", "")):  # a file where a folder is to be, a stray update
        inbox = desk.home / f"in-{number}"
        (inbox / name).parent.mkdir(exist_ok=True)
        (inbox / name).write_text("x")
        if name in ("", "alice" if key else "alice.update"):
            with pytest.raises(InputError):
                courier_send(desk.owner.home, outbox, into=inbox, **options)
            assert (inbox / name).read_text() == "x" and not carrier.jobs


def test_an_inbox_takes_one_round(desk: Desk) -> None:
    """Else the update of an earlier round would count as the answer."""
    desk.export(2)
    first, second = deliveries(desk)["alice"], deliveries(desk, 2)["alice"]
    reply(desk, first, "alice", "owner", desk.proxy("alice"))
    first.take()
    with pytest.raises(InputError, match="update of another proxy"):
        second.check()
    sealed = [Sealed(one.sent, one.carried, desk.home.parent / "sealed") for one in (first, second)]
    reply(desk, first, "alice", "owner", desk.proxy("alice"))
    sealed[0].take()
    sealed[0].check()
    with pytest.raises(InputError, match="answer to another order"):
        sealed[1].check()


def test_a_round_is_sent_and_taken_and_sent_again_without_any_training(desk: Desk, carrier: Carrier) -> None:
    outbox = desk.pack()
    for _ in range(2):
        result = courier_send(desk.owner.home, outbox, into=desk.home / "in", key=desk.key.private, deadline="1m")
        assert [(one.client, one.state) for one in result.clients] == [("alice", "arrived"), ("bob", "arrived")]
        assert len(carrier.jobs) == 2
    assert contents(desk.home / "in/alice")["update.json"] and not list(desk.owner.host.carried.iterdir())
    with pytest.raises(InputError, match="--at-least: there are 2 proxies"):
        courier_send(desk.owner.home, outbox, into=desk.home / "in", at_least=3)
    shutil.rmtree(desk.home / "in")
    desk.export(2)
    later = desk.pack("later", number=2)
    (carrier.sites["bob"].settings).write_text(carrier.sites["bob"].settings.read_text().replace("= 10\n", "= 0.5\n"))
    with pytest.raises(GateFailed, match=r"1 of 2 updates came in time \(alice arrived, bob waiting\)"):
        courier_send(desk.owner.home, later, into=desk.home / "in-2", key=desk.key.private, deadline="1s")
    assert "epochs 1.0, and the site allows 0.5" in carrier.problems[0]


@pytest.mark.parametrize("ending", [KeyboardInterrupt, OSError])
def test_who_is_interrupted_leaves_no_job_and_goes_on_when_run_again(
    ending: type[BaseException], desk: Desk, carrier: Carrier, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox, options = desk.pack(), {"into": desk.home / "in", "key": desk.key.private, "deadline": "1m"}
    carrier.slow = True

    def interrupted(*_: object) -> None:
        raise ending

    with monkeypatch.context() as patch, pytest.raises(ending):
        patch.setattr(Carrier, "at_work", interrupted)
        courier_send(desk.owner.home, outbox, **options)
    assert list(carrier.jobs.values()) == ["FINISHED:ABORTED"] * 2
    assert not (desk.home / "in").exists() and not list(desk.owner.host.carried.iterdir())
    carrier.slow = False
    assert courier_send(desk.owner.home, outbox, **options).arrived == 2


def test_jobs_of_a_send_that_was_killed_are_ended_before_others_are_submitted(desk: Desk, carrier: Carrier) -> None:
    outbox = desk.pack()
    carrier.jobs = {"left": "RUNNING", "done": "FINISHED:COMPLETED", "another proxy's": "RUNNING"}
    name = deliveries_of(desk, outbox)[0].sent.name
    carrier.names = {"left": name, "done": name, "another proxy's": "0"}
    courier_send(desk.owner.home, outbox, into=desk.home / "in", key=desk.key.private, deadline="1m")
    assert [carrier.jobs[job] for job in ("left", "done", "another proxy's")] == [
        "FINISHED:ABORTED",
        "FINISHED:COMPLETED",
        "RUNNING",
    ]


def test_a_site_cannot_answer_for_another(desk: Desk, carrier: Carrier) -> None:
    carrier.sites["bob"] = carrier.sites["alice"]  # alice's machine answers for bob, too
    with pytest.raises(GateFailed, match="bob waiting"):
        courier_send(desk.owner.home, desk.pack(), into=desk.home / "in", key=desk.key.private, deadline="1s")
    assert "does not open" in carrier.problems[0]


def test_the_key_is_looked_at_before_anything_is_sent(desk: Desk, carrier: Carrier) -> None:
    outbox = desk.pack()
    with nothing_written(desk.home.parent):
        with pytest.raises(InputError, match="there is no key"):
            courier_send(desk.owner.home, outbox, into=desk.home / "in", key=desk.home / "no.key")
        with pytest.raises(InputError, match="not the owner's folder"):
            courier_send(desk.owner.host.home, outbox, into=desk.home / "in", key=desk.key.private)
        with pytest.raises(InputError, match="not a folder of a courier"):
            courier_send(desk.home, outbox, into=desk.home / "in")
    assert not carrier.jobs
