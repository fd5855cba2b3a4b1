"""A host that lies: what it changes, swaps, cuts, adds, or sends a second time. Beside it: a site that does."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fedqsn_cli import seal
from fedqsn_cli.courier.flare import transfer
from fedqsn_cli.courier.flare.job import ORDER, PARTS, PROBLEM, REFERENCES, CourierController, CourierExecutor
from fedqsn_cli.courier.flare.transfer import fetch_parts
from fedqsn_cli.courier.outbox import Consignment, read_outbox
from fedqsn_cli.courier.parts import Part, Parts, PartWriter, fetch_file
from fedqsn_cli.courier.work import NoUpdate, SiteRound
from fedqsn_cli.crypto.keys import load_signing_key, load_verify_key
from fedqsn_cli.errors import FormatError, InputError, SignatureError
from support.courier import Desk, answer, carry
from support.helpers import nothing_written
from support.signing import party


def sent(desk: Desk, number: int = 1) -> dict[str, Consignment]:
    """What the host was given for each client."""
    outbox = read_outbox(desk.pack(f"outbox-{number}", number=number), load_verify_key(desk.key.public))
    return {one.order.client: one for one in outbox}


def received(desk: Desk, client: str, order: str, fetch: Callable[[Parts, Path], int]) -> SiteRound:
    round = SiteRound.of(desk.site(client), order)
    answer(round, fetch)
    return round


def changed(part: Callable[[bytes], bytes]) -> Callable[[Path], Callable[[Parts, Path], int]]:
    """A host that changes the bytes of each part."""

    def of(source: Path) -> Callable[[Parts, Path], int]:
        def fetch(one: Part, writer: PartWriter) -> None:
            writer.write(part(source.read_bytes()[one.start : one.start + one.length]))

        return lambda parts, target: fetch_file(parts, target, fetch)

    return of


@pytest.mark.parametrize(
    "lie",
    [
        lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: data + b"!",
        lambda data: data * 1000,
    ],
    ids=["a byte changed", "half", "nothing", "a byte more", "a thousand times as much"],
)
def test_a_site_takes_the_bytes_that_the_owner_signed_and_no_others(desk: Desk, lie: Callable[[bytes], bytes]) -> None:
    one = sent(desk)["alice"]
    with pytest.raises(FormatError, match="did not arrive as it was sent|longer than it was said to be"):
        received(desk, "alice", one.text, changed(lie)(one.sealed))
    site = desk.site("alice")
    assert sum(path.stat().st_size for path in site.rounds.rglob("*")) < one.order.sealed.size + 10_000  # no more came
    assert received(desk, "alice", one.text, carry(one.sealed)).sealed_update.exists()  # an honest host goes on


def test_proxies_of_two_clients_cannot_be_swapped(desk: Desk) -> None:
    outbox = sent(desk)
    alice, bob = outbox["alice"], outbox["bob"]
    with pytest.raises(FormatError, match="did not arrive as it was sent"):
        received(desk, "alice", alice.text, carry(bob.sealed))
    with pytest.raises(FormatError, match="does not open"):
        received(desk, "alice", bob.text, carry(bob.sealed))


def test_orders_and_proxies_of_another_round_are_no_way_to_have_something_trained_again(desk: Desk) -> None:
    first = sent(desk)["alice"]
    before = received(desk, "alice", first.text, carry(first.sealed)).sealed_update.read_bytes()
    desk.export(2)
    second = sent(desk, 2)["alice"]
    with pytest.raises(FormatError, match="did not arrive as it was sent"):
        received(desk, "alice", second.text, carry(first.sealed))
    again = received(desk, "alice", first.text, carry(first.sealed))  # all of the last round, once more
    assert again.sealed_update.read_bytes() == before
    log = desk.site("alice").log.read_text()
    assert log.count("is ready") == 1 and log.count("asked to train") == 3


def test_a_proxy_that_is_larger_than_the_site_allows_is_refused_before_a_byte_comes(desk: Desk) -> None:
    one, site = sent(desk)["alice"], desk.site("alice")
    site.settings.write_text(site.settings.read_text().replace('"20GB"', f'"{(one.order.sealed.size - 1) / 1000}KB"'))

    def fetch(parts: Parts, target: Path) -> int:
        raise AssertionError("the site has begun to fetch")

    with pytest.raises(InputError, match="asks for bytes"):
        received(desk, "alice", one.text, fetch)


def test_a_host_cannot_write_orders_itself_nor_seal_proxies(desk: Desk) -> None:
    one, eve = sent(desk)["alice"], party(desk.home, "eve")
    with pytest.raises(SignatureError):
        received(desk, "alice", one.order.signed(load_signing_key(eve.private)), carry(one.sealed))
    own = desk.home / "own.sealed"
    seal(desk.proxy("bob"), own, to=desk.site("alice").home / "site.pub")  # for this, the public key is enough
    with pytest.raises(FormatError, match="did not arrive as it was sent"):
        received(desk, "alice", one.text, carry(own))


@pytest.mark.parametrize("lie", [TypeError("x"), AssertionError(), ConnectionError("gone")])
def test_a_message_that_flare_cannot_read_is_a_part_that_did_not_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: Exception
) -> None:
    def download(*_: object, **__: object) -> None:
        raise lie

    monkeypatch.setattr(transfer, "download_object", download)
    parts = Parts((Part(0, 1, "0" * 64),))
    with pytest.raises(FormatError, match="a part did not arrive"):
        fetch_parts(parts, ["a"], "server", tmp_path / "target", None, None)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("references", [None, [], ["a", "b"], [1], "a", {"a": 1}])
def test_an_offer_that_does_not_name_each_part_is_refused(tmp_path: Path, references: object) -> None:
    parts = Parts((Part(0, 1, "0" * 64),))
    with nothing_written(tmp_path), pytest.raises(FormatError, match="not an offer of these parts"):
        fetch_parts(parts, references, "server", tmp_path / "target", None, None)


# ------------------------------------------------------------------------------------------------ both sides' classes


class Context:
    """As much of FLARE's context as the classes of a job ask for."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root

    def get_engine(self) -> Context:
        return self

    def get_workspace(self) -> Context:
        return self

    def get_cell(self) -> None:
        return None

    def get_job_id(self) -> str:
        return "job"

    def get_root_dir(self) -> str:
        return str(self.root)


def executed(desk: Desk, client: str, order: object) -> dict[str, Any]:
    """What a site's executor replies to a message."""
    message = {ORDER: order, REFERENCES: ["x"]}
    reply = CourierExecutor().execute("round", message, Context(desk.site(client).kit), SimpleNamespace(triggered=""))
    return dict(reply)


@pytest.mark.parametrize("order", [None, 7, "", "{}", '{"payload": 1}', "[" * 5000])
def test_a_message_that_is_no_order_is_refused_and_the_answer_tells_nothing(desk: Desk, order: object) -> None:
    reply = executed(desk, "alice", order)
    assert reply[PROBLEM] == "the site refused the proxy or what was asked for; its log says why"
    assert "refused: " in desk.site("alice").log.read_text()


def test_a_site_whose_disk_takes_no_line_of_its_log_trains_nothing_and_says_no(desk: Desk) -> None:
    site = desk.site("alice")
    site.log.mkdir()  # as with a full disk, it cannot be written
    assert "its log says why" in executed(desk, "alice", sent(desk)["alice"].text)[PROBLEM]
    assert not list(site.rounds.iterdir())


def controller(desk: Desk, update: Path) -> CourierController:
    one = sent(desk)["alice"]
    return CourierController("alice", str(one.sealed), str(update), one.order.sealed.to_document(), one.text)


class Result(dict[str, Any]):
    """What a site answers."""

    def get_return_code(self) -> str:
        return "OK"


def taken(made: CourierController, client: str, **told: Any) -> str | None:
    task = SimpleNamespace(client=SimpleNamespace(name=client), result=Result(told))
    made._received(task, Context())
    return made._problem


def test_a_site_answers_for_itself_once_and_within_limits(desk: Desk, tmp_path: Path) -> None:
    update = tmp_path / "update"
    made = controller(desk, update)
    huge = {PARTS: [[1 << 40, "0" * 64]], REFERENCES: ["x"]}
    assert taken(made, "bob", **huge) == "site 'bob' answered for 'alice'"
    assert "far larger than any update" in str(taken(made, "alice", **huge))
    assert "not a list of parts" in str(taken(made, "alice", **{PARTS: "x", REFERENCES: ["x"]}))
    assert "more parts than" in str(taken(made, "alice", **{PARTS: [[1, "0" * 64]] * 9, REFERENCES: ["x"] * 9}))
    assert taken(made, "alice", **{PROBLEM: "out of memory"}) == "no update: out of memory"
    assert taken(made, "alice", **{PROBLEM: "a\nb\x1b[2J" + "c" * 10**6}) == "no update: a\\nb\\x1b[2J" + "c" * 193
    update.write_bytes(b"the first answer")
    assert taken(made, "alice", **huge) is None  # a second answer is not even fetched
    assert update.read_bytes() == b"the first answer"


def test_a_servers_worker_does_not_import_torch(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take 150 MiB and seconds at the end of each job."""
    monkeypatch.setitem(sys.modules, "nvflare.app_opt.pt", ModuleType("pt"))  # put back afterwards
    controller(desk, tmp_path / "update").start_controller(Context())
    with pytest.raises(ImportError):
        importlib.import_module("nvflare.app_opt.pt.tensor_downloader")


def test_a_round_that_was_answered_and_removed_is_told_so(desk: Desk) -> None:
    one = sent(desk)["alice"]
    round = received(desk, "alice", one.text, carry(one.sealed))
    round.sealed_update.unlink()
    with pytest.raises(NoUpdate):
        received(desk, "alice", one.text, carry(one.sealed))
    assert executed(desk, "alice", one.text)[PROBLEM] == "this proxy was answered before"
