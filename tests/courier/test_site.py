"""What a site decides, what the owner may ask for, and that a site does each step once."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fedqsn_cli import seal, unseal, verify
from fedqsn_cli.courier import work
from fedqsn_cli.courier.layout import Site
from fedqsn_cli.courier.parts import Offer, Part
from fedqsn_cli.courier.recipe import Recipe
from fedqsn_cli.courier.site import TEMPLATE, SiteSettings
from fedqsn_cli.courier.work import NoUpdate, SiteRound
from fedqsn_cli.crypto.keys import load_signing_key, load_verify_key
from fedqsn_cli.errors import FormatError, InputError, SignatureError
from support.signing import Party, party, sign_folder

RECIPE = Recipe(epochs=2.0, lr=1e-3, batch_size=8, update_format="fp32")

TRAINER = """
import json, os, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
words = sys.argv[1:]
Path({calls!r}).open("a").write(json.dumps(words) + "\\n")
time.sleep(float(os.environ.get("TRAINING_TAKES", "0")))
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
    Site(home).settings.write_text(TEMPLATE.format(data='"a.jsonl"', eval_data="", device='"cpu"', max_length=32))
    program = tmp_path / "trainer.py"
    program.write_text(TRAINER.format(tests=str(Path(__file__).parents[1]), calls=str(tmp_path / "calls")))
    monkeypatch.setattr(work, "_PROGRAM", [sys.executable, str(program)])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    return Site(home)


def calls(site: Site) -> list[list[str]]:
    path = site.home.parent / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def sent(site: Site, owner: Party, signer: Party | None = None) -> tuple[SiteRound, str]:
    """A proxy that has come sealed, and what is asked for."""
    proxy = site.home.parent / "proxy"
    proxy.mkdir()
    (proxy / "proxy.json").write_text("{}")
    sign_folder(proxy, signer or owner)
    round = SiteRound.of(site, Offer(1, (Part(0, 1, "0" * 64),)))
    seal(proxy, round.sealed_proxy, to=site.home / "site.pub")
    return round, RECIPE.signed(hashlib.sha256(b"{}").hexdigest(), load_signing_key(owner.private))


def answer(round: SiteRound, recipe: str) -> None:
    with round.alone(lambda: False) as held:
        round.answer(recipe, held, lambda: False)


def test_a_site_opens_trains_signs_and_seals(site: Site, owner: Party, tmp_path: Path) -> None:
    round, recipe = sent(site, owner)
    answer(round, recipe)
    unseal(round.sealed_update, tmp_path / "update", key=owner.private, verify_key=site.home / "site.pub")
    assert verify(tmp_path / "update", key=site.home / "site.pub").files
    (words,) = calls(site)
    assert words[0] == "client-train" and words[words.index("--data") + 1] == str(site.home / "a.jsonl")
    assert words[words.index("--epochs") + 1] == "2.0" and words[words.index("--max-length") + 1] == "32"
    assert "--epochs 2.0 --lr 0.001" in site.log.read_text()
    before = round.sealed_update.read_bytes()
    answer(round, recipe)
    assert len(calls(site)) == 1 and round.sealed_update.read_bytes() == before  # asked twice, trained once


def test_a_proxy_of_somebody_else_is_not_trained(site: Site, owner: Party, tmp_path: Path) -> None:
    round, recipe = sent(site, owner, party(tmp_path, "eve"))
    with pytest.raises(SignatureError):
        answer(round, recipe)
    assert not calls(site)


def test_what_somebody_else_asks_for_and_what_is_for_another_proxy_is_refused(
    site: Site, owner: Party, tmp_path: Path
) -> None:
    round, _ = sent(site, owner)
    digest = hashlib.sha256(b"{}").hexdigest()
    eve = party(tmp_path, "eve")
    with pytest.raises(SignatureError):
        answer(round, RECIPE.signed(digest, load_signing_key(eve.private)))
    with pytest.raises(FormatError, match="for another proxy"):
        answer(round, RECIPE.signed("0" * 64, load_signing_key(owner.private)))
    assert not calls(site)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 11.0}, "epochs 11.0, and the site allows 10"),
        ({"lr": 0.5}, "lr 0.5"),
        ({"batch_size": 10**6}, "batch_size"),
        ({"epochs": float("nan")}, "JSON|nan|NaN|Out of range"),
        ({"epochs": -1.0}, "epochs -1.0"),
        ({"update_format": "--data=/etc/passwd"}, "no updates in"),
    ],
)
def test_the_site_bounds_what_the_owner_asks_for(
    site: Site, owner: Party, change: dict[str, float | str], message: str
) -> None:
    round, _ = sent(site, owner)
    with pytest.raises((InputError, ValueError), match=message):
        digest = hashlib.sha256(b"{}").hexdigest()
        answer(round, replace(RECIPE, **change).signed(digest, load_signing_key(owner.private)))  # type: ignore[arg-type]
    assert not calls(site)


def test_a_training_that_is_killed_is_no_update_and_the_next_one_may_be(
    site: Site, owner: Party, monkeypatch: pytest.MonkeyPatch
) -> None:
    round, recipe = sent(site, owner)
    monkeypatch.setenv("TRAINING_FAILS", "1")
    with pytest.raises(NoUpdate, match="exit code -9"):
        answer(round, recipe)
    monkeypatch.delenv("TRAINING_FAILS")
    answer(round, recipe)
    assert round.sealed_update.exists()


def test_a_training_ends_with_its_time_and_with_those_who_wait(
    site: Site, owner: Party, monkeypatch: pytest.MonkeyPatch
) -> None:
    round, recipe = sent(site, owner)
    monkeypatch.setenv("TRAINING_TAKES", "60")
    site.settings.write_text(site.settings.read_text().replace('"6h"', '"1s"'))
    with pytest.raises(NoUpdate, match="longer than the site allows"):
        answer(round, recipe)
    with round.alone(lambda: False) as held, pytest.raises(NoUpdate, match="was ended"):
        round.answer(recipe, held, lambda: True)


def test_a_training_that_outlives_a_killed_worker_is_waited_for(site: Site, owner: Party, tmp_path: Path) -> None:
    """The lock is the child's, too: the next worker finds the update instead of training beside it."""
    round, recipe = sent(site, owner)
    script = (
        "import sys; from pathlib import Path; from fedqsn_cli.courier import work; "
        f"work._PROGRAM = [sys.executable, {str(tmp_path / 'trainer.py')!r}]; "
        "from fedqsn_cli.courier.layout import Site; from fedqsn_cli.courier.work import SiteRound\n"
        f"round = SiteRound(Site(Path({str(site.home)!r})), Path({str(round.folder)!r}))\n"
        f"with round.alone(lambda: False) as held: round.answer({recipe!r}, held, lambda: False)"
    )
    worker = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"TRAINING_TAKES": "3"})
    while not calls(site):
        time.sleep(0.05)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    answer(round, recipe)
    assert len(calls(site)) == 1 and round.sealed_update.exists()


def test_settings_are_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    good = TEMPLATE.format(data='"a.jsonl"', eval_data='eval_data = "b.jsonl"\n', device='"cpu"', max_length=32)
    path.write_text(good)
    assert SiteSettings.read(path).words()[-2:] == ["--eval-data", str(tmp_path / "b.jsonl")]
    wrong = [good.replace("data =", "dta =", 1), good.replace("[bounds]", "[limits]"), good + "more = 1\n", "x", "\xff"]
    for text in [*wrong, good.replace('"6h"', "6"), good.replace("epochs", "epoch")]:
        path.write_text(text, "latin-1")
        with pytest.raises(InputError):
            SiteSettings.read(path)
    with pytest.raises(InputError, match="a time such as 6h"):
        path.write_text(good.replace('"6h"', '"200"'))
        SiteSettings.read(path)
    with pytest.raises(InputError, match="no such file"):
        SiteSettings.read(tmp_path / "nowhere")


def test_a_recipe_holds_numbers_and_nothing_else(owner: Party) -> None:
    key, digest = load_signing_key(owner.private), "0" * 64
    for wrong in ({"epochs": "2"}, {"lr": [1]}, {"update_format": 3}):
        text = replace(RECIPE, **wrong).signed(digest, key)  # type: ignore[arg-type]
        with pytest.raises(FormatError, match="malformed"):
            Recipe.opened(text, digest, load_verify_key(owner.public))
