"""What no client can train is refused by `mask` and `export-proxy`, before a key or a ledger is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedqsn_cli import export_proxy, mask
from fedqsn_cli.errors import InputError
from fedqsn_cli.models.architecture import is_known_architecture
from support.families import EVERY_HEAD, build
from support.helpers import nothing_written
from support.processes import run
from support.untrainable import VARIABLE, refuse_untrainable_models


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is for everybody else: most tests allow what no client can train."""
    refuse_untrainable_models(monkeypatch)


def edit(folder: Path, **fields: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def without(folder: Path, pattern: str) -> Path:
    for path in folder.glob(pattern):
        path.unlink()
    return folder


def spoil(folder: Path, what: str) -> Path:
    """A checkpoint that no client can train."""
    if what == "tied":
        return edit(build("llama", folder, tokenizer=True), tie_word_embeddings=True)
    if what == "vocabulary":
        return build("llama", folder, tokenizer=True, vocab_size=90)
    build("bert", folder, tokenizer=True)
    match what:
        case "config":
            return without(folder, "config.json")
        case "tokenizer":
            return without(folder, "tokenizer*")
        case "words":
            return without(folder, "tokenizer.json")
        case "custom code":
            return edit(folder, architectures=["MineForCausalLM"], auto_map={"AutoModelForCausalLM": "mine.Mine"})
        case "head":
            return edit(folder, architectures=["BertModel"])
        case _:
            return edit(folder, architectures=None)


REASONS = {
    "config": "there is no config.json",
    "architecture": "config.json does not name one architecture",
    "head": "architecture BertModel has no head that can be used",
    "custom code": "transformers has no architecture MineForCausalLM, and code that comes with a model is never run",
    "tokenizer": "it has no tokenizer",
    "words": "has no vocabulary file",
    "vocabulary": "its tokenizer has ids up to 96, but the model only 90 tokens",
    "tied": "lm_head.weight, though config.json ties the two",
}


def export(model: Path, where: Path, **more: Any) -> Any:
    secret = {"key": where / "job.key", "ledger": where / "ledger.jsonl"}
    return export_proxy(model, where / "proxy", client="ann", round=1, p1=0.25, p2=0.25, **secret, **more)


@pytest.mark.parametrize("what", REASONS)
def test_what_no_client_can_train_is_refused_before_anything_is_written(tmp_path: Path, what: str) -> None:
    model, where = spoil(tmp_path / "model", what), tmp_path / "job"
    where.mkdir()
    complaint = f"no client can train a proxy of this model: .*{REASONS[what]}.*--allow-untrainable"
    with nothing_written(where), pytest.raises(InputError, match=complaint) as caught:
        mask(model, where / "server", p1=0.25, key=where / "job.key")
    assert "\n" not in str(caught.value)
    with nothing_written(where), pytest.raises(InputError, match=complaint):
        export(model, where)


@pytest.mark.parametrize("what", REASONS)
def test_those_who_know_better_may_release_it_all_the_same(tmp_path: Path, what: str) -> None:
    model = spoil(tmp_path / "model", what)
    mask(model, tmp_path / "server", p1=0.25, key=tmp_path / "job.key", allow_untrainable=True)
    assert export(model, tmp_path, allow_untrainable=True).proxies[0].client == "ann"
    assert (tmp_path / "ledger.jsonl").read_text().count("\n") == 1


def test_the_option_changes_no_byte(tmp_path: Path) -> None:
    model = build("bert", tmp_path / "model", tokenizer=True)
    first = export(model, tmp_path)
    before = (tmp_path / "proxy" / "proxy.json").read_bytes()
    assert export(model, tmp_path, allow_untrainable=True, force=True).proxies == first.proxies
    assert (tmp_path / "proxy" / "proxy.json").read_bytes() == before


def test_models_with_code_of_their_own_that_transformers_knows_too_are_accepted(tmp_path: Path) -> None:
    model = edit(build("phi3", tmp_path / "model", tokenizer=True), auto_map={"AutoModelForCausalLM": "phi.Phi"})
    assert export(model, tmp_path).proxies


def test_the_command_ends_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = spoil(tmp_path / "model", "tokenizer")
    words = ["mask", model, "--out", tmp_path / "server", "--p1", "0.1", "--key", tmp_path / "key"]
    ended = run(*words)
    assert (ended.code, len(ended.err.splitlines())) == (2, 1)
    assert "correct it, or give --allow-untrainable" in ended.err
    assert run(*words, "--allow-untrainable").code == 0
    monkeypatch.setenv(VARIABLE, "1")
    assert run(*words, "--force").code == 0


def test_every_head_of_the_tests_is_known_and_nothing_is_imported_for_that() -> None:
    assert all(is_known_architecture(head) for _, head in EVERY_HEAD)
    assert not is_known_architecture("BertForEverything")
    assert is_known_architecture("BertForTokenClassification")
    code = "import sys; from fedqsn_cli.models.architecture import is_known_architecture as known; known('x')"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print({{'torch', 'transformers'}} & set(sys.modules))"],
        capture_output=True,
        text=True,
    )
    assert done.stdout == "set()\n"
