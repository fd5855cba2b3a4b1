"""Special files, endless files and numbers beyond all bounds, in every place where a command reads one."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedqsn_cli import strictjson
from fedqsn_cli.checkpoint.files import check_size, read_file
from fedqsn_cli.errors import FormatError, InputError
from support.attacks import World, make_world
from support.processes import run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def fifo(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def broken(path: Path) -> None:
    path.symlink_to("nowhere")


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(64 << 30)


SPECIAL = (fifo, endless, folder, broken, sparse)
OF_A_PROXY = ("proxy.json", "config.json", "tokenizer.json", "tokenizer_config.json", "visible.safetensors")


@pytest.mark.parametrize(
    ("name", "make"), [*zip(OF_A_PROXY, SPECIAL, strict=True), *zip(OF_A_PROXY, SPECIAL[1:] + SPECIAL[:1], strict=True)]
)
def test_a_special_file_in_a_proxy_is_refused_at_once(
    name: str, make: Callable[[Path], None], world: World, tmp_path: Path
) -> None:
    proxy = world.copy("proxy", tmp_path)
    (proxy / name).unlink()
    make(proxy / name)
    started = time.process_time()
    for words in (("inspect", proxy), ("client-train", proxy, "--out", tmp_path / "out", "--data", world.data)):
        ended = run(*words)
        assert ended.code == 2, (words, ended)
        assert len(ended.err.strip().splitlines()) == 1
    audited = run("audit", proxy, "--truth", world.model, "--key", world.key, "--ledger", world.ledger)
    assert audited.code in (3, 4), audited
    assert "internal error" not in audited.err
    assert time.process_time() - started < 10  # what waits for ever meets the limit of all tests
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [fifo, endless, sparse])
@pytest.mark.parametrize("option", ["--policy", "--baseline", "--key", "--ledger"])
def test_a_special_file_given_to_audit_is_refused_at_once(
    option: str, make: Callable[[Path], None], world: World, tmp_path: Path
) -> None:
    make(tmp_path / "file")
    ended = run("audit", world.proxy, option, tmp_path / "file")
    assert ended.code in (2, 3), ended
    assert "internal error" not in ended.err


@pytest.mark.parametrize("make", SPECIAL)
def test_a_special_plan_file_is_refused_at_once(make: Callable[[Path], None], world: World, tmp_path: Path) -> None:
    make(tmp_path / "plan.toml")
    assert run("inspect", world.model, "--show-plan", "--plan-file", tmp_path / "plan.toml").code == 2


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_file(path, 5) == b"12345"
    check_size(path, 5)
    for refuse in (read_file, check_size):
        with pytest.raises(FormatError, match="larger than 4 bytes"):
            refuse(path, 4)
        with pytest.raises(InputError, match="no such file"):
            refuse(tmp_path / "other", 4)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"a": "\\ud800"}', "half of a character"),
        ('{"\\uDFFF": 1}', "half of a character"),
        ('{"a": 1e999}', "too large"),
        ('{"a": -1e999}', "too large"),
        ('{"a": ' + "9" * 400 + "}", "too large"),
        ('{"a": NaN}', "not a number"),
        ("[" * 100_000, "nested too deeply"),
        ("[" + "0," * strictjson.MOST_VALUES + "0]", "more than"),
        (b'{"a": "\xff"}', "not UTF-8"),
    ],
)
def test_json_beyond_all_bounds_is_refused(text: str | bytes, what: str) -> None:
    with pytest.raises(FormatError, match=what):
        strictjson.loads(text, "file")


def test_a_character_of_two_halves_is_fine() -> None:
    assert strictjson.loads('"\\ud83d\\ude00"', "file") == "\U0001f600"


NUMBERS_AND_TEXT = ('"\\ud800"', "1e999", "9" * 400, "NaN")


@pytest.mark.parametrize("value", NUMBERS_AND_TEXT)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_what_no_reader_can_hold_is_not_exported(name: str, value: str, world: World, tmp_path: Path) -> None:
    model = world.copy("model", tmp_path)
    document = json.loads((model / name).read_text()) if (model / name).exists() else {}
    (model / name).write_text(json.dumps(document | {"hostile": "HERE"}).replace('"HERE"', value))
    ended = run(*world.export(model, tmp_path))
    assert ended.code == 2, ended
    assert name in ended.err
    assert not (tmp_path / "proxy").exists()
    assert not (tmp_path / "ledger.jsonl").exists()


@pytest.mark.parametrize("number", ["9" * 400, "inf", "nan", "-inf", "9" * 5000])
def test_a_policy_with_numbers_that_limit_nothing_is_refused(number: str, world: World, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(f"[limits.proxy]\ncosine = {number}\n")
    ended = run("audit", world.proxy, "--policy", policy)
    assert (ended.code, len(ended.err.strip().splitlines())) == (2, 1), ended


def replaced(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def quantized(world: World, tmp_path: Path) -> Iterator[Path]:
    """A quantized server model."""
    shutil.copytree(world.root / "quantized", tmp_path / "quantized")
    yield tmp_path / "quantized"


@pytest.mark.parametrize("change", [None, "layout", "block_size", "format", "double_quant"])
def test_a_manifest_that_denies_how_tensors_are_packed_is_refused(
    change: str | None, quantized: Path, world: World, tmp_path: Path
) -> None:
    held = json.loads((quantized / "fedqsn.json").read_text())["quantization"]
    other = {"layout": "dense", "block_size": 128, "format": "fp4", "double_quant": True}
    replaced(quantized / "fedqsn.json", quantization=None if change is None else held | {change: other[change]})
    ended = run(*world.export(quantized, tmp_path, p1=None))
    assert ended.code == 2, ended
    assert "quantization" in ended.err


def test_a_manifest_that_speaks_of_packing_where_there_is_none_is_refused(
    quantized: Path, world: World, tmp_path: Path
) -> None:
    server = world.copy("server", tmp_path)
    held = json.loads((quantized / "fedqsn.json").read_text())["quantization"]
    replaced(server / "fedqsn.json", quantization=held)
    assert run(*world.export(server, tmp_path, p1=None)).code == 2
