"""Tokenizers and chat templates that take for ever, or all memory: every command that tokenizes ends soon, with 2."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest

from support.attacks import World, make_world
from support.families import build
from support.processes import run
from support.training_jobs import write_lines

SLOW = 40.0  # seconds, on a machine that is busy


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    # patched: limits that a stranger's file should meet must not be options, and the real ones take ten seconds each
    monkeypatch.setattr("fedqsn_cli.training.data.tokenizing.SECONDS", 1)
    monkeypatch.setattr("fedqsn_cli.training.data.tokenizing.MEMORY", 1 << 24)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def with_parts(folder: Path, /, **parts: object) -> Path:
    document = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(document | parts))
    return folder


def replacing(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


DOUBLING = {"type": "Sequence", "normalizers": [replacing({"String": "w"}, "ww")] * 40}

HOSTILE: dict[str, dict[str, Any]] = {
    "a text is doubled forty times": {"normalizer": DOUBLING},
    "a text is put between all characters": {
        "normalizer": {"type": "Sequence", "normalizers": [replacing({"Regex": "."}, "y" * 99)] * 9}
    },
    "a pattern that tries everything": {"pre_tokenizer": split("(a+)+$")},
    "a pattern with a huge count": {"pre_tokenizer": split("((a{1,999}){1,999}){1,999}")},
    "an invalid pattern": {"pre_tokenizer": split("(")},
    "ids out of range": {"model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}},
    "no model": {"model": None},
    "an unknown part": {"normalizer": {"type": "Nothing"}},
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_tokenizer_ends_with_one_line(what: str, world: World, tmp_path: Path) -> None:
    model = with_parts(world.copy("model", tmp_path), **HOSTILE[what])
    data = write_lines(tmp_path / "data.jsonl", [{"text": "w3 " + "a" * 40 + "b", "label": 1}])
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    ended = run("evaluate", model, "--data", data)
    assert (ended.code, len(ended.err.strip().splitlines())) in ((2, 1), (0, 0)), ended
    assert ended.code == 2 or "pattern" in what  # onig gives up on some patterns, and finds nothing
    assert time.monotonic() - started < SLOW
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


TEMPLATES = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x",
    "grows": "{{ 'a' * 99999999999 }}",
    "doubles": "{% set n = namespace(t='a') %}{% for a in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}{{ n.t }}",
    "breaks": "{{ nothing.at.all }}",
    "does not parse": "{% if %}",
}


@pytest.mark.parametrize("what", TEMPLATES)
def test_a_hostile_chat_template_ends_with_one_line(what: str, tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model", tokenizer=True)
    (model / "chat_template.jinja").write_text(TEMPLATES[what])
    messages = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]
    data = write_lines(tmp_path / "data.jsonl", [{"messages": messages}])
    started = time.monotonic()
    ended = run("evaluate", model, "--data", data)
    assert (ended.code, len(ended.err.strip().splitlines())) == (2, 1), ended
    assert time.monotonic() - started < SLOW


def test_an_update_of_a_hostile_proxy_is_not_written(world: World, tmp_path: Path) -> None:
    model = with_parts(world.copy("model", tmp_path), normalizer=DOUBLING)
    assert run(*world.export(model, tmp_path)).code == 0
    words = ("client-train", tmp_path / "proxy", "--out", tmp_path / "update", "--data", world.data)
    assert run(*words, "--max-steps", "1").code == 2
    assert not list(tmp_path.glob("*update*"))


ENTRIES = {
    "client-train": "client-train {proxy} --out {out} --data {data} --max-steps 1",
    "client-train --show-examples": "client-train {proxy} --out {out} --data {data} --show-examples 1",
    "client-train --dry-run": "client-train {proxy} --out {out} --data {data} --dry-run",
    "evaluate": "evaluate {model} --data {data}",
    "consolidate": "consolidate {model} {server} --out {out} --key {key} --own-data {data} --transfer-data {data} "
    "--steps 1",
    "merge --blend auto": "merge {model} --restore {server} --out {out} --key {key} --blend auto --eval-data {data}",
    "audit": "audit {proxy} --truth {model} --key {key} --ledger {ledger} --eval-data {data} --public-data {data}",
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A job whose model came with a tokenizer that doubles every text."""
    world = make_world(tmp_path_factory.mktemp("hostile"))
    with_parts(world.model, normalizer=DOUBLING)
    for name, words in {
        "server": ["mask", world.model, "--out", world.root / "server", "--key", world.key, "--force"],
        "proxy": [*world.export(world.model, world.root, p1=None), "--force"],
    }.items():
        assert run(*words).code == 0, name
    return world


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_command_that_tokenizes_ends_with_one_line(entry: str, hostile: World, tmp_path: Path) -> None:
    places = {name: hostile.root / name for name in ("model", "server", "proxy")}
    words = ENTRIES[entry].format(
        **places, out=tmp_path / "out", data=hostile.data, key=hostile.key, ledger=hostile.ledger
    )
    started = time.monotonic()
    ended = run(*words.split())
    if entry == "audit":  # it goes on to what can be checked, and says what cannot
        assert ended.code == 3, ended
    else:
        assert (ended.code, len(ended.err.strip().splitlines())) == (2, 1), ended
    assert "takes too" in ended.out + ended.err
    assert not list(tmp_path.iterdir())
    assert time.monotonic() - started < SLOW


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
def test_texts_that_a_model_writes_are_tokenized_and_decoded_with_limits(part: str, tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model", tokenizer=True)
    parts = {"normalizer": DOUBLING, "decoder": {"type": "Sequence", "decoders": DOUBLING["normalizers"]}}
    with_parts(model, **{part: parts[part]})
    data = write_lines(tmp_path / "data.jsonl", [{"prompt": "w3 w4", "completion": "w5"}])
    ended = run("evaluate", model, "--data", data, "--generate", "--max-new-tokens", "4")
    assert (ended.code, len(ended.err.strip().splitlines())) == (2, 1), ended
    assert "takes too" in ended.err
