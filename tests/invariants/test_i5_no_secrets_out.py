"""I5, no secrets out: no byte of a proxy or an update tells the key, seeds, paths, names, the host or the clock."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from fedqsn_cli import client_train, export_proxy
from fedqsn_cli.masks import job_key
from support.families import build
from support.helpers import (
    HOST,
    USER,
    contents,
    hidden_elements,
    make_model,
    make_tensors,
    read_model,
    set_host_names,
    visible_elements,
    write_file,
)
from support.scenario import JobFolder, Scenario, few, job_folder, scenarios

SECRET = "Zq7-owner-of-this-model"  # stands in every place that could be copied by mistake


@pytest.fixture(autouse=True, scope="module")
def known_machine() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        set_host_names(patch)
        yield


def needles(folder: Path, key: Path) -> dict[str, bytes]:
    """What must not be found anywhere."""
    loaded = job_key.load(key)
    found = {
        "the key": loaded.key,
        "the key in hex": loaded.key.hex().encode(),
        "the key in capitals": loaded.key.hex().upper().encode(),
        "the key in base64": base64.b64encode(loaded.key)[:40],
        "half of the key": loaded.key[:16],
        "a hash of the key": hashlib.sha256(loaded.key).digest(),
        "its hash in hex": hashlib.sha256(loaded.key).hexdigest().encode(),
        "the path": str(folder).encode(),
        "the folder's name": folder.name.encode(),
        "the marker": SECRET.encode(),
        "another client": b"bob-the-other",
        "the client": b"ann-the-one",
        "the ledger": b"ledger",
        "the day": time.strftime("%Y-%m-%d").encode(),
        "the host": HOST.encode(),
        "the user": USER.encode(),
    }
    for group in loaded.groups:
        for scope in (("server",), ("client", "ann-the-one", "1"), ("client", "bob-the-other", "1")):
            fields = [field.encode() for field in ("fedqsn/v1", *scope, group)]
            seed = hmac.digest(
                loaded.key, b"".join(len(field).to_bytes(8, "big") + field for field in fields), "sha256"
            )
            found[f"seed {scope} {group}"] = seed
            found[f"seed in hex {scope} {group}"] = seed.hex().encode()
    return found


def clock_pattern(now: float) -> bytes:
    """Seconds, thousandths and so on, and dates, as whole numbers: digests and fractions have such digits by chance."""
    seconds, day = str(int(now))[:7], time.strftime("%Y%m%d", time.localtime(now))
    return rf"(?<![0-9a-f.])(?:{seconds}\d{{3}}(?:\d{{3}}){{0,3}}|{day}\d{{0,6}})(?![0-9a-f])".encode()


def test_a_clock_is_told_from_a_digest() -> None:
    now, day = 1795722123.75, time.strftime("%Y%m%d", time.localtime(1795722123.75))
    for clock in (f"{int(now)}", f"{now}", f"{now * 1e3:.0f}", f"{now * 1e9:.0f}", day, f"{day}T101112Z"):
        assert re.search(clock_pattern(now), f'{{"at": "{clock}"}}'.encode())
    for chance in (f"{int(now)}".ljust(64, "a"), f"0.{int(now)}", f"{day}".ljust(64, "b")):
        assert not re.search(clock_pattern(now), f'{{"at": "{chance}"}}'.encode())


def check(files: dict[str, bytes], secrets: dict[str, bytes]) -> None:
    for name, data in files.items():
        for label, secret in secrets.items():
            assert secret not in data, f"{label} is in {name}"
        if name.endswith(".json"):
            assert not re.search(clock_pattern(time.time()), data), f"the clock is in {name}"


@few(25)
@given(scenarios())
def test_i5_no_secret_is_in_any_byte_of_a_proxy(scenario: Scenario) -> None:
    with job_folder(scenario) as job:
        dress(job.model)
        proxies = job.export(job.model, "proxies", clients=("ann-the-one", "bob-the-other"))
        check(contents(proxies / "ann-the-one"), needles(job.root, job.key))


def dress(model: Path) -> None:
    """Put private things into every file of a checkpoint that goes along."""
    config = json.loads((model / "config.json").read_text())
    config |= {
        "_name_or_path": f"/srv/{SECRET}/model",
        "trained_in": str(model),
        "sub": {"name_or_path": SECRET},
        "note": f"copied from /home/{SECRET}/base",
        "_commit_hash": SECRET,
    }
    (model / "config.json").write_text(json.dumps(config))
    tokenizer = {"pad_token": "[PAD]", "name_or_path": SECRET, "tokenizer_file": str(model), "vocab_file": SECRET}
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (model / "generation_config.json").write_text(json.dumps({"_name_or_path": SECRET, "max_length": 20}))
    for name in ("README.md", "training_args.bin", "optimizer.pt", "trainer_state.json", ".env", "notes.txt"):
        (model / name).write_text(SECRET)


def test_i5_metadata_of_the_owners_files_stays_at_home(folder: Path) -> None:
    job = JobFolder(Scenario("bert", "F32", 33, 48, 1, "neuron", "nf4", None, 64, False, "zero", 0.3, 0.2), folder)
    make_model(job.model, "bert", hidden=33)
    write_file(job.model / "model.safetensors", make_tensors("bert", hidden=33), {"format": "pt", "run": SECRET})
    dress(job.model)
    proxy = job.export(job.model, "proxies", clients=("ann-the-one",)) / "ann-the-one"
    check(contents(proxy), needles(folder, job.key))


@pytest.mark.parametrize(("format", "double"), [("nf4", False), ("nf4", True), ("fp4", True), ("int8", False)])
def test_i5_a_proxy_does_not_say_which_of_its_holes_the_server_made(format: str, double: bool, folder: Path) -> None:
    """Hidden units of the server and of the client look alike: the same codes, the same scale, one bit a unit."""
    job = JobFolder(Scenario("bert", "F32", 64, 64, 1, "neuron", format, None, 64, double, "zero", 0.3, 0.3), folder)
    make_model(job.model, "bert", hidden=64, inner=64)
    proxy = job.export(job.model, "proxies", clients=("ann-the-one",)) / "ann-the-one"
    manifest = json.loads((proxy / "proxy.json").read_bytes())
    assert not {"p1", "p2", "hidden", "model_digest", "plan", "client"} & set(json.dumps(manifest).split('"'))
    server, shown = hidden_elements(job.model, job.key), visible_elements(proxy)
    tensors, name = read_model(proxy), "bert.pooler.dense.weight"
    codes = tensors[name][1].reshape(64, -1)
    scales = tensors[f"{name}.absmax" if format != "int8" else "bert.pooler.dense.SCB"][1]
    holes = ~shown[name][0].any(axis=1)
    by_server = server[name].any(axis=1)
    assert 0 < by_server.sum() < holes.sum()
    assert len(set(scales[holes])) == 1
    assert len(set(map(bytes, codes[holes]))) == 1


@pytest.mark.parametrize("force", [False, True])
def test_i5_the_place_and_time_of_an_export_change_no_byte(force: bool, folder: Path) -> None:
    job = JobFolder(Scenario("gpt2", "BF16", 33, 48, 1, "neuron", "nf4", None, 64, False, "zero", 0.3, 0.2), folder)
    make_model(job.model, "gpt2", dtype="BF16", hidden=33)
    first = contents(job.export(job.model, "proxies"))
    (folder / "deep/er").mkdir(parents=True)
    job.model.rename(folder / "deep/er/other-name")
    time.sleep(1.1)
    again = job.export(folder / "deep/er/other-name", "proxies" if force else "elsewhere", force=force)
    assert contents(again) == first


def test_i5_no_secret_is_in_any_byte_of_an_update(folder: Path) -> None:
    model = build("bert", folder / "model", tokenizer=True, num_hidden_layers=1)
    common: dict[str, Any] = {"round": 1, "key": folder / "job.key", "p1": 0.2, "p2": 0.2}
    export_proxy(str(model), folder / "ann-the-one", client="ann-the-one", ledger=folder / "l.jsonl", **common)
    data = folder / f"{SECRET}.jsonl"
    rows = ({"text": f"w{3 + n} w5 w6 {SECRET}", "label": n % 5} for n in range(8))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    client_train(str(folder / "ann-the-one"), folder / "update", data=str(data), epochs=1, batch_size=4)
    files = contents(folder / "update")
    assert set(files) == {"update.json", "update.safetensors"}
    check(files, needles(folder, folder / "job.key"))
