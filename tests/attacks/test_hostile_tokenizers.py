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
    monkeypatch.setattr("fedqsn_cli.training.data.SECONDS", 1)


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
