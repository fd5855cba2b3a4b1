"""Every command at work: what it prints for people, for programs and for scripts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cli.conftest import Round
from support.processes import process, run

MADE = {"mask": "server", "quantize": "server-nf4", "client-train": "update", "merge": "next"}


@pytest.mark.parametrize("command", ["mask", "quantize", "export-proxy", "client-train", "merge", "evaluate"])
def test_a_command_ends_with_0_and_one_json_document(played: Round, command: str) -> None:
    outcome = played.outcomes[command]
    assert (outcome.code, outcome.err) == (0, "")
    assert isinstance(json.loads(outcome.out), dict)


@pytest.mark.parametrize(("command", "name"), MADE.items())
def test_a_command_names_what_it_made(played: Round, command: str, name: str) -> None:
    document = played.json(command)
    made = Path(str(document.get("path") or document["update"]))
    assert made == played.folder / name
    assert made.is_dir()


def test_an_export_names_every_proxy(played: Round) -> None:
    proxies = played.json("export-proxy")["proxies"]
    assert isinstance(proxies, list)
    assert [(each["client"], each["path"]) for each in proxies] == [
        (name, str(played.folder / name)) for name in ("alice", "bob")
    ]


def test_nothing_that_is_printed_holds_the_key(played: Round) -> None:
    secret = json.loads((played.folder / "job.key").read_text())["key"]
    printed = [outcome.out + outcome.err for outcome in played.outcomes.values()]
    printed += [run("inspect", path, *how).out for path in played.folder.iterdir() for how in ((), ("--json",))]
    assert all(secret not in text for text in printed)


def test_tables_are_for_people(played: Round, tmp_path: Path) -> None:
    key = ("--key", played.folder / "job.key")
    masked = run("mask", played.folder / "global", "--out", tmp_path / "server", *key)
    assert masked.out.startswith(f"server model  {tmp_path}/server\nhidden        2")
    exported = run(
        "export-proxy",
        tmp_path / "server",
        "--out",
        tmp_path / "proxy",
        "--client",
        "carol",
        "--round",
        "1",
        "--p2",
        "0.1",
        *key,
        "--ledger",
        tmp_path / "ledger.jsonl",
    )
    assert f"carol   {tmp_path}/proxy" in exported.out
    assert "in the clear           0." in exported.out


def test_a_new_key_is_announced(played: Round, tmp_path: Path) -> None:
    outcome = run(
        "mask", played.folder / "global", "--out", tmp_path / "s", "--p1", "0.1", "--key", tmp_path / "job.key"
    )
    assert f"new key       {tmp_path}/job.key: keep it secret, and keep it\n" in outcome.out
    assert (tmp_path / "job.key").stat().st_mode & 0o777 == 0o600


def test_quiet_prints_only_the_path(played: Round, tmp_path: Path) -> None:
    outcome = run("quantize", played.folder / "server", "--out", tmp_path / "q", "--format", "nf3", "--quiet")
    assert (outcome.out, outcome.err) == (f"{tmp_path}/q\n", "")


def test_quiet_evaluation_prints_the_accuracy(played: Round) -> None:
    data = played.folder / "train.jsonl"
    both = [str(played.folder / "next"), str(played.folder / "alice")]
    several = json.loads(run("evaluate", *both, "--data", data, "--device", "cpu", "--json").out)
    assert list(several) == both and several[both[0]] == played.json("evaluate")
    outcome = run("evaluate", *both, "--data", data, "--device", "cpu", "-q")
    assert [float(line) for line in outcome.out.split()] == [several[name]["accuracy"] for name in both]
    outcome = run("evaluate", played.folder / "next", "--data", data, "--device", "cpu", "-q")
    assert float(outcome.out) == played.json("evaluate")["accuracy"]


def test_an_evaluation_is_a_table_with_the_columns_of_its_task(played: Round) -> None:
    data = played.folder / "train.jsonl"
    outcome = run("evaluate", played.folder / "alice", "--data", data, "--device", "cpu")
    header, row = outcome.out.splitlines()
    assert header.split() == ["model", "examples", "loss", "accuracy", "macro", "F1", "MCC"]
    assert row.split()[:2] == [str(played.folder / "alice"), "12"]


def test_an_output_is_never_replaced_without_force(played: Round, tmp_path: Path) -> None:
    words = ["quantize", played.folder / "server", "--out", tmp_path / "q", "--format", "nf4"]
    assert run(*words).code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "q").iterdir()}
    refused = run(*words)
    assert (refused.code, refused.out) == (2, "")
    assert "--force" in refused.err
    assert {path: path.read_bytes() for path in (tmp_path / "q").iterdir()} == before
    assert run(*words, "--force").code == 0


def test_a_folder_that_is_not_ours_survives_force(played: Round, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    words = ["quantize", played.folder / "server", "--out", tmp_path / "mine", "--format", "nf4", "--force"]
    assert run(*words).code == 2
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"


def test_a_tampered_proxy_is_refused_in_one_line(played: Round, tmp_path: Path) -> None:
    proxy = Path(shutil.copytree(played.folder / "bob", tmp_path / "bob"))
    config = proxy / "config.json"
    config.write_text(config.read_text() + " ")
    outcome = run("client-train", proxy, "--out", tmp_path / "u", "--data", played.folder / "train.jsonl")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert not (tmp_path / "u").exists()


def test_a_whole_command_as_a_process_says_nothing_on_stderr(played: Round, tmp_path: Path) -> None:
    words = ["client-train", played.folder / "bob", "--out", tmp_path / "u", "--data", played.folder / "train.jsonl"]
    outcome = process(*words, "--max-steps", "1", "--device", "cpu", "-q", OMP_NUM_THREADS="1")
    assert (outcome.code, outcome.out, outcome.err) == (0, f"{tmp_path}/u\n", "")


def test_owners_commands_load_no_training_library(played: Round, tmp_path: Path) -> None:
    import subprocess
    import sys

    from support.processes import environment

    script = (
        "import sys; from fedqsn_cli.cli.app import main; code = main(sys.argv[1:]); "
        "print(code, sorted({'torch', 'transformers', 'bitsandbytes', 'pyarrow'} & set(sys.modules)))"
    )
    words = ["export-proxy", played.folder / "server", "--out", tmp_path / "p", "--client", "eve", "--round", "1", "-q"]
    words += ["--p2", "0.1", "--key", played.folder / "job.key", "--ledger", tmp_path / "ledger.jsonl"]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)], env=environment(), capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "0 []"
