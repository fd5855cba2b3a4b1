"""What a site decides, what the owner may ask for, and that a site does each step once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from fedqsn_cli import seal, unseal, verify
from fedqsn_cli.courier import setup, work
from fedqsn_cli.courier.layout import Site
from fedqsn_cli.courier.orders import PREDICATE, Order
from fedqsn_cli.courier.parts import Parts
from fedqsn_cli.courier.site import TEMPLATE, SiteSettings
from fedqsn_cli.courier.work import NoUpdate, SiteRound
from fedqsn_cli.crypto import dsse
from fedqsn_cli.crypto.keys import load_signing_key
from fedqsn_cli.errors import FormatError, InputError, SignatureError
from fedqsn_cli.options import CourierJoinOptions, ProposalOptions
from support.courier import answer, carry, write_settings
from support.helpers import listing
from support.signing import Party, party, sign_folder

PROPOSAL = ProposalOptions(epochs=2.0, lr=1e-3, batch_size=8)

TRAINER = """
import json, os, resource, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
words = sys.argv[1:]
Path({calls!r}).open("a").write(json.dumps(words) + "\\n")
time.sleep(float(os.environ.get("TRAINING_TAKES", "0")))
if "TRAINING_TAKES_BYTES" in os.environ:
    while resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY:
        time.sleep(0.01)  # the site sets it when it has started this process
    bytearray(int(os.environ["TRAINING_TAKES_BYTES"]))
if "TRAINING_FAILS" in os.environ:
    os.kill(os.getpid(), 9)
out = Path(words[words.index("--out") + 1])
from support.signing import Party, sign_folder
stage = out.with_name("stage")
stage.mkdir()
(stage / "update.json").write_text("{{}}")
sign_folder(stage, Party(Path(words[words.index("--sign") + 1]), Path()))
stage.rename(out)
"""


@pytest.mark.parametrize("name", ["\U0001f600.jsonl", "é.jsonl", 'a"b\\c.jsonl', "a\nb\tc", "a\x7fb\x1b", "{data}"])
def test_the_paths_that_a_site_joins_with_are_those_that_it_reads(name: str, tmp_path: Path) -> None:
    options = CourierJoinOptions(out=tmp_path, name="alice", data=name, eval_data=name)
    (tmp_path / "site.toml").write_text(setup._settings(options), encoding="utf-8")
    found = SiteSettings.read(tmp_path / "site.toml")
    assert (found.data, found.eval_data) == (tmp_path / name, tmp_path / name)


@pytest.fixture
def owner(tmp_path: Path) -> Party:
    return party(tmp_path, "owner")


@pytest.fixture
def site(tmp_path: Path, owner: Party, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A site whose trainer writes down how it was called."""
    home = tmp_path / "site"
    home.mkdir()
    keys = party(home, "site")
    assert keys.private == Site(home).private_key
    Site(home).owner_key.write_bytes(owner.public.read_bytes())
    write_settings(Site(home))
    program = tmp_path / "trainer.py"
    program.write_text(TRAINER.format(tests=str(Path(__file__).parents[1]), calls=str(tmp_path / "calls")))
    monkeypatch.setattr(work, "_PROGRAM", [sys.executable, str(program)])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    return Site(home)


def calls(site: Site) -> list[list[str]]:
    path = site.home.parent / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@dataclass(frozen=True)
class Sent:
    """A proxy that is on its way, and the order for it."""

    site: Site
    sealed: Path
    order: Order
    key: Party

    def answer(self, order: Order | None = None, key: Party | None = None) -> SiteRound:
        """What the site does; returns the round."""
        text = (order or self.order).signed(load_signing_key((key or self.key).private))
        round = SiteRound.of(self.site, text)
        answer(round, carry(self.sealed))
        return round


@pytest.fixture
def sent(site: Site, owner: Party) -> Sent:
    return send_to(site, owner, owner)


def send_to(site: Site, owner: Party, signer: Party) -> Sent:
    proxy, sealed = site.home.parent / "proxy", site.home.parent / "proxy.sealed"
    proxy.mkdir()
    (proxy / "proxy.json").write_text("{}")
    sign_folder(proxy, signer)
    seal(proxy, sealed, to=site.home / "site.pub")
    order = Order("alice", hashlib.sha256(b"{}").hexdigest(), "0" * 64, Parts.of(sealed, 100), PROPOSAL)
    return Sent(site, sealed, order, owner)


def test_a_site_fetches_opens_trains_signs_and_seals(sent: Sent, owner: Party, tmp_path: Path) -> None:
    site, round = sent.site, sent.answer()
    unseal(round.sealed_update, tmp_path / "update", key=owner.private, verify_key=site.home / "site.pub")
    assert verify(tmp_path / "update", key=site.home / "site.pub").files
    (words,) = calls(site)
    assert words[0] == "client-train" and words[words.index("--data") + 1] == str(site.home / "a.jsonl")
    assert "--epochs=2.0" in words and words[words.index("--max-length") + 1] == "32"
    assert "--epochs=2.0 --lr=0.001" in site.log.read_text()
    before = round.sealed_update.read_bytes()
    sent.answer()
    assert len(calls(site)) == 1 and round.sealed_update.read_bytes() == before  # asked twice, trained once


def test_a_proxy_that_comes_again_after_its_answer_was_removed_is_not_trained_again(sent: Sent) -> None:
    shutil.rmtree(sent.answer().folder)
    with pytest.raises(NoUpdate, match="was answered before"):
        sent.answer()
    assert len(calls(sent.site)) == 1


def test_a_proxy_of_somebody_else_is_not_trained(site: Site, owner: Party, tmp_path: Path) -> None:
    with pytest.raises(SignatureError):
        send_to(site, owner, party(tmp_path, "eve")).answer()
    assert not calls(site)


def test_what_somebody_else_asks_for_and_what_is_for_another_proxy_is_refused(sent: Sent, tmp_path: Path) -> None:
    with pytest.raises(SignatureError):
        sent.answer(key=party(tmp_path, "eve"))
    with pytest.raises(FormatError, match="not the proxy of its order"):
        sent.answer(replace(sent.order, proxy_sha256="1" * 64))
    assert not calls(sent.site)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 11.0}, "epochs 11.0, and the site allows 10"),
        ({"lr": 0.5}, "lr 0.5"),
        ({"batch_size": 10**6}, "batch_size"),
        ({"update_format": "nf4"}, "no updates in nf4"),
        ({"method": "lora", "lora_r": 65}, "lora_r 65, and the site allows 64"),
    ],
)
def test_the_site_bounds_what_the_owner_asks_for(sent: Sent, change: dict[str, float | str], message: str) -> None:
    site = sent.site
    site.settings.write_text(site.settings.read_text().replace(', "nf4"', ""))
    with pytest.raises(InputError, match=message):
        sent.answer(replace(sent.order, proposal=replace(PROPOSAL, **change)))  # type: ignore[arg-type]
    assert not calls(site) and not site.rounds.exists()  # refused before a byte was fetched
    assert "asked to train" in site.log.read_text()


@pytest.mark.parametrize("digest", ["../../../evil", "/tmp/evil", "1" * 63, "A" * 64, ""])
@pytest.mark.parametrize("field", ["proxy_sha256", "folder_sha256"])
def test_an_order_leads_to_no_place_of_its_own(sent: Sent, field: str, digest: str) -> None:
    before = listing(sent.site.home)
    with pytest.raises(FormatError, match="sha256|folder"):
        sent.answer(replace(sent.order, **{field: digest}))  # type: ignore[arg-type]
    assert listing(sent.site.home) == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": None},
        {"lr": [1]},
        {"epochs": None},
        {"epochs": True},
        {"epochs": "1"},
        {"epochs": -1.0},
        {"batch_size": None},
        {"batch_size": 2.5},
        {"batch_size": 0},
        {"update_format": 3},
        {"update_format": "--data=x"},
        {"method": None},
        {"method": "code"},
        {"lora_r": 4},  # without the method
        {"method": "lora", "lora_r": "8"},
        {"method": "lora", "target_modules": "all-linear"},
        {"method": "lora", "target_modules": [1]},
        {"data": "/etc/passwd"},
    ],
)
def test_an_order_holds_values_of_options_and_nothing_else(sent: Sent, wrong: dict[str, Any]) -> None:
    order = sent.order
    predicate: dict[str, Any] = {"client": order.client, "folder": order.folder_sha256}
    predicate |= {"sealed": order.sealed.to_document(), "training": asdict(PROPOSAL) | wrong}
    subject = {"name": "proxy.json", "digest": {"sha256": order.proxy_sha256}}
    payload = dsse.statement([subject], PREDICATE, predicate)
    signature = dsse.sign(payload, load_signing_key(sent.key.private))
    with pytest.raises(FormatError, match="the order is malformed"):
        SiteRound.of(sent.site, json.dumps(dsse.envelope(payload, signature)))
    assert not sent.site.rounds.exists()


def test_a_site_may_allow_one_method_and_the_rank_that_is_meant_is_bounded(sent: Sent) -> None:
    site, lora = sent.site, replace(sent.order, proposal=replace(PROPOSAL, method="lora"))
    good = site.settings.read_text()
    site.settings.write_text(good.replace('methods = ["full", "lora"]', 'methods = ["full"]'))
    with pytest.raises(InputError, match="does not train with the method lora"):
        sent.answer(lora)
    site.settings.write_text(good.replace("lora_r = 64", "lora_r = 7"))
    with pytest.raises(InputError, match="lora_r 8, and the site allows 7"):
        sent.answer(lora)
    site.settings.write_text(good)
    sent.answer(lora)
    assert "--method=lora" in calls(site)[0] and "--method=lora" in site.log.read_text()


def test_words_of_the_owner_stay_words_and_its_lines_stay_lines(sent: Sent) -> None:
    names = ("--data=/etc/passwd", "a\n2026-01-01 refused: nothing")
    sent.answer(replace(sent.order, proposal=replace(PROPOSAL, method="lora", target_modules=names)))
    assert f"--target-modules={names[0]}" in calls(sent.site)[0] and names[0] not in calls(sent.site)[0]
    assert len(sent.site.log.read_text().splitlines()) == 2


def test_a_training_that_is_killed_is_no_update_and_the_next_one_may_be(
    sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINING_FAILS", "1")
    with pytest.raises(NoUpdate, match="exit code -9"):
        sent.answer()
    monkeypatch.delenv("TRAINING_FAILS")
    assert sent.answer().sealed_update.exists()


def test_a_training_that_takes_more_memory_than_the_site_gives_is_no_update(
    sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = sent.site.settings
    settings.write_text(settings.read_text().replace('# max_memory = "16GB"', 'max_memory = "200MB"'))
    monkeypatch.setenv("TRAINING_TAKES_BYTES", str(10**9))
    with pytest.raises(NoUpdate, match="exit code 1"):
        sent.answer()
    monkeypatch.setenv("TRAINING_TAKES_BYTES", str(10**6))
    assert sent.answer().sealed_update.exists()


def test_a_training_ends_with_its_time_and_with_those_who_wait(sent: Sent, monkeypatch: pytest.MonkeyPatch) -> None:
    site = sent.site
    monkeypatch.setenv("TRAINING_TAKES", "60")
    site.settings.write_text(site.settings.read_text().replace('"6h"', '"0.3s"'))
    with pytest.raises(NoUpdate, match="longer than the site allows"):
        sent.answer()
    round = SiteRound.of(site, sent.order.signed(load_signing_key(sent.key.private)))
    with round.alone(lambda: False) as held, pytest.raises(NoUpdate, match="was ended"):
        round.answer(carry(sent.sealed), held, lambda: True)


def test_a_training_that_outlives_a_killed_worker_is_waited_for(
    sent: Sent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is the child's, too: the next worker finds the update instead of training beside it."""
    site = sent.site
    monkeypatch.setenv("TRAINING_TAKES", "1")
    worker = os.fork()
    if not worker:
        sent.answer()
        os._exit(0)
    while not calls(site):
        time.sleep(0.02)
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    assert sent.answer().sealed_update.exists() and len(calls(site)) == 1


def test_settings_are_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    good = TEMPLATE.format(data='"a.jsonl"', eval_data='eval_data = "b.jsonl"\n', device='"cpu"', max_length=32)
    path.write_text(good)
    read = SiteSettings.read(path)
    assert read.words()[-2:] == ["--eval-data", str(tmp_path / "b.jsonl")]
    assert (read.max_bytes, read.max_memory) == (20 * 10**9, None)
    wrong = [good.replace("data =", "dta =", 1), good.replace("[bounds]", "[limits]"), good + "more = 1\n", "x", "\xff"]
    wrong += [good.replace('"20GB"', '"much"'), good.replace("max_bytes", "bytes"), good.replace("methods", "method")]
    wrong += [good.replace(" = 32", " = 0"), good.replace("= 0.01", "= -1"), good.replace("= 0.01", "= nan")]
    wrong += [good.replace('"full"', '"ful"'), good.replace('"nf4"', '"nf5"'), good.replace('"6h"', '"0s"')]
    wrong += [good.replace("epochs = 10", 'epochs = "10"'), good.replace("max_length = 32", "max_length = true")]
    wrong += ["x = " + "[" * 9999, "x = " + "9" * 9999, good.replace('"20GB"', '"' + "9" * 400 + 'TB"')]
    for text in [*wrong, good.replace('"6h"', "6"), good.replace("epochs", "epoch")]:
        path.write_text(text, "latin-1")
        with pytest.raises(InputError):
            SiteSettings.read(path)
    with pytest.raises(InputError, match="a time such as 6h"):
        path.write_text(good.replace('"6h"', '"200"'))
        SiteSettings.read(path)
    with pytest.raises(InputError, match="no such file"):
        SiteSettings.read(tmp_path / "nowhere")
