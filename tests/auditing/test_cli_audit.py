"""`fedqsn audit` as a command: inputs, formats, files and exit codes; and that its outputs keep what they must keep."""

from __future__ import annotations

import base64
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest

import fedqsn_cli
from fedqsn_cli import export_proxy, merge, strictjson
from fedqsn_cli.artifacts.manifests import file_digest
from fedqsn_cli.auditing.report import FORMATS
from fedqsn_cli.cli.views import AuditView
from fedqsn_cli.errors import InputError
from fedqsn_cli.masks import job_key
from fedqsn_cli.masks.draw import hidden_units
from support.helpers import make_model, nothing_written, read_file, read_model, send, to_floats, write_file
from support.keys import known_key
from support.processes import Outcome, environment, run
from support.signing import party

CLIENTS = ("ann", "bob")
QUERY = "bert.encoder.layer.0.attention.self.query.weight"
LENIENT = '[scope]\nrequire = ["invariants", "exposure", "recovery"]\n[limits.proxy]\ncosine = 0.999\n'


@pytest.fixture(scope="module")
def job(module_folder: Path) -> Iterator[Path]:
    """A job of two clients and two rounds."""
    make_model(module_folder / "global", "bert", hidden=64, inner=128)
    make_model(module_folder / "base", "bert", hidden=64, inner=128, seed=1)
    for number in (1, 2):
        with known_key():
            export_proxy(
                str(module_folder / "global"),
                module_folder / f"r{number}" / "{client}",
                client=CLIENTS,
                round=number,
                key=module_folder / "job.key",
                ledger=module_folder / "ledger.jsonl",
                p1=0.25,
                p2=0.25,
            )
    (module_folder / "policy.toml").write_text(LENIENT)
    yield module_folder


def audit(job: Path, *more: str | Path, proxies: str = "r1") -> Outcome:
    folders = [job / proxies / name for name in CLIENTS] if proxies else []
    return run("audit", *folders, *owner(job), *more)


def owner(job: Path) -> list[str | Path]:
    return ["--truth", job / "global", "--key", job / "job.key", "--ledger", job / "ledger.jsonl"]


def test_clean_proxies_pass_and_the_report_says_what_was_measured(job: Path) -> None:
    outcome = audit(job, "--policy", job / "policy.toml")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("verdict  passed, but not for skill (exit code 0)")
    for word in ("hidden from everyone", "worst 2 clients", "coalition of 2", "lower bound"):
        assert word in outcome.out


def test_a_limit_that_is_exceeded_is_exit_code_1(job: Path, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text("[limits.coalition]\ncosine = 0.1\n")
    assert audit(job, "--policy", tmp_path / "p.toml").code == 1


def test_the_command_offers_every_format() -> None:
    assert get_args(get_type_hints(AuditView)["format"]) == FORMATS


@pytest.mark.parametrize("form", FORMATS)
def test_no_format_changes_the_exit_code(job: Path, tmp_path: Path, form: str) -> None:
    (tmp_path / "p.toml").write_text("[limits.coalition]\ncosine = 0.1\n")
    assert audit(job, "--policy", tmp_path / "p.toml", "--format", form).code == 1
    assert audit(job, "--policy", job / "policy.toml", "--format", form).code == 0


def test_ledger_and_key_alone_give_the_exposure(job: Path) -> None:
    outcome = run("audit", "--key", job / "job.key", "--ledger", job / "ledger.jsonl", "--json")
    document = json.loads(outcome.out)
    assert outcome.code == 0
    assert [client["client"] for client in document["exposure"]["clients"]] == ["ann", "bob"]
    assert document["recovery"] == []


def test_a_policy_that_requires_proxies_does_not_pass_without_any(job: Path) -> None:
    assert audit(job, "--policy", job / "policy.toml", proxies="").code == 3


def test_without_any_input_there_is_nothing_to_audit(job: Path) -> None:
    outcome = run("audit", "--key", job / "job.key")
    assert (outcome.code, outcome.out) == (2, "")
    with pytest.raises(InputError, match="nothing to audit"):
        fedqsn_cli.audit()


@pytest.mark.parametrize("missing", ["--truth", "--key"])
def test_a_missing_input_is_not_a_pass(job: Path, missing: str) -> None:
    words = owner(job)
    place = words.index(missing)
    outcome = run("audit", job / "r1" / "ann", *words[:place], *words[place + 2 :])
    assert outcome.code == 3
    assert missing in outcome.out


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_policy_that_init_policy_writes_needs_truth_key_and_ledger(job: Path, tmp_path: Path, count: int) -> None:
    assert run("audit", "--init-policy", "--policy", tmp_path / "p.toml").code == 0
    words = owner(job)
    for missing in itertools.combinations(range(0, len(words), 2), count):
        given = [word for place, word in enumerate(words) if place // 2 * 2 not in missing]
        outcome = run("audit", job / "r1" / "ann", *given, "--policy", tmp_path / "p.toml")
        assert outcome.code == 3, given
        assert all(str(words[place]) in outcome.out for place in missing)


def test_an_audit_says_plainly_what_it_did_not_check(job: Path, tmp_path: Path) -> None:
    outcome = run("audit", job / "r1" / "ann", "--report", tmp_path / "r.html")
    listed = outcome.out.split("\nnot checked")[1]
    alone = {"FQ001", "FQ002", "FQ004", "FQ005", "FQ006", "FQ009", "FQ010"}
    assert alone <= set(re.findall(r"^(FQ\d+) ", listed, re.MULTILINE))
    document = json.loads(run("audit", job / "r1" / "ann", "--json").out)
    assert alone <= {one["rule"] for one in document["unchecked"]}
    assert all(one["why"] for one in document["unchecked"])
    assert document["unchecked"] == [
        {key: one[key] for key in ("rule", "scope", "why")}
        for one in sorted(document["checked"], key=lambda one: one["rule"])
        if one["status"] == "not-run"
    ]
    page = (tmp_path / "r.html").read_text()
    assert "<h2>Not checked</h2>" in page and "FQ001 hidden-influence" in page
    assert "not checked" in run("audit", job / "r1" / "ann", "--format", "markdown").out.split("<details>")[0]


FALSE: dict[str, dict[str, object]] = {
    "rescale": {"rescale": False},
    "round": {"round": 7},
    "job": {"job": "f" * 64},
    "another id": {"proxy_id": "e" * 64},
}


@pytest.mark.parametrize("fields", FALSE.values(), ids=FALSE)
def test_a_false_statement_of_a_proxy_is_found_with_the_owners_inputs_and_passes_no_gate_without(
    job: Path, tmp_path: Path, fields: dict[str, object]
) -> None:
    liar = Path(shutil.copytree(job / "r1" / "ann", tmp_path / "ann"))
    document = json.loads((liar / "proxy.json").read_text())
    (liar / "proxy.json").write_text(strictjson.pretty(document | fields))
    run("audit", "--init-policy", "--policy", tmp_path / "p.toml")
    assert run("audit", liar, *owner(job), "--policy", tmp_path / "p.toml").code == 4
    assert run("audit", liar, "--policy", tmp_path / "p.toml").code == 3


def test_a_hidden_row_in_a_norm_passes_no_gate_without_the_truth(job: Path, tmp_path: Path) -> None:
    liar = Path(shutil.copytree(job / "r1" / "ann", tmp_path / "ann"))
    tensors = read_file(liar / "model.safetensors")
    norm = "bert.embeddings.LayerNorm.weight"
    hidden = hidden_units(job_key.load(job / "job.key").key, QUERY, 64, 0.25)
    row = read_model(job / "global")[QUERY][1][np.flatnonzero(hidden)[0]]
    tensors[norm] = (tensors[norm][0], row)
    write_file(liar / "model.safetensors", tensors, {"format": "pt"})
    document = json.loads((liar / "proxy.json").read_text())
    document["files"]["model.safetensors"] = file_digest(liar / "model.safetensors")
    (liar / "proxy.json").write_text(strictjson.pretty(document))
    run("audit", "--init-policy", "--policy", tmp_path / "p.toml")
    assert run("audit", liar, *owner(job), "--policy", tmp_path / "p.toml").code == 4
    assert run("audit", liar, "--policy", tmp_path / "p.toml").code == 3


def test_what_cannot_be_read_is_not_a_pass(job: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(job / "r1" / "ann", tmp_path / "ann"))
    (broken / "proxy.json").write_text("{")
    assert run("audit", broken, *owner(job)).code == 4
    assert run("audit", tmp_path / "no-such-proxy", *owner(job)).code == 3
    assert run("audit", job / "r1" / "ann", "--truth", tmp_path / "none", *owner(job)[2:]).code == 3
    (tmp_path / "ledger.jsonl").write_text("{}\n")
    words = [*owner(job)[:4], "--ledger", tmp_path / "ledger.jsonl"]
    assert run("audit", job / "r1" / "ann", *words).code == 3


def test_a_hard_invariant_beats_everything_and_no_waiver_helps(job: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(job / "r1" / "ann", tmp_path / "ann"))
    (other / "notes.txt").write_text("seed 1234")
    assert run("audit", other, *owner(job), "--policy", job / "policy.toml").code == 4
    (tmp_path / "p.toml").write_text('[[waiver]]\nrule = "FQ010"\nreason = "r"\nowner = "o"\nexpires = 2999-01-01\n')
    refused = run("audit", other, *owner(job), "--policy", tmp_path / "p.toml")
    assert (refused.code, refused.out) == (2, "")
    assert "cannot be waived" in refused.err


def test_a_merge_is_checked_with_the_model_after_it(job: Path, tmp_path: Path) -> None:
    update = send(job / "r1" / "ann", tmp_path / "update", lambda name, shape: np.zeros(shape, np.float32))
    merge(str(job / "global"), [update], tmp_path / "next", key=job / "job.key", ledger=job / "ledger.jsonl")
    (tmp_path / "p.toml").write_text('[scope]\nrequire = ["merge"]\n')
    assert audit(job, "--after", tmp_path / "next", "--policy", tmp_path / "p.toml").code == 0
    assert audit(job, "--policy", tmp_path / "p.toml").code == 3


# ------------------------------------------------------------------------------------------------ baseline, files


def test_an_audit_is_the_baseline_of_the_next(job: Path, tmp_path: Path) -> None:
    assert audit(job, "--format", "json", "--output", tmp_path / "last.json").code == 0
    assert audit(job, "--baseline", tmp_path / "last.json").code == 0
    document = json.loads((tmp_path / "last.json").read_text())
    document["measures"]["proxy cosine"] -= 0.1
    (tmp_path / "last.json").write_text(json.dumps(document))
    worse = audit(job, "--baseline", tmp_path / "last.json")
    assert (worse.code, "FQ205" in worse.out) == (1, True)
    (tmp_path / "last.json").write_text("{}")
    assert audit(job, "--baseline", tmp_path / "last.json").code == 2


def test_output_and_report_are_files_and_text_is_printed_beside_them(job: Path, tmp_path: Path) -> None:
    outcome = audit(job, "--format", "sarif", "--output", tmp_path / "a.sarif", "--report", tmp_path / "r.html")
    assert outcome.out.startswith("verdict  passed")
    assert json.loads((tmp_path / "a.sarif").read_text())["version"] == "2.1.0"
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")


def signed_by(job: Path, folder: Path, option: str) -> list[str | Path]:
    """What an attestation needs beside its path."""
    needed: list[str | Path] = ["--sign", party(folder, "owner").private, "--policy", job / "policy.toml"]
    return needed if option == "--attest" else []


@pytest.mark.parametrize("option", ["--report", "--output", "--attest", "--attack-state"])
def test_where_no_report_can_be_written_nothing_is_audited(
    job: Path, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedqsn_cli.auditing.run.open_inputs", None)
    outcome = audit(job, option, job / "missing/report.html", *signed_by(job, tmp_path, option))
    assert (outcome.code, outcome.err) == (2, f"fedqsn: error: {job}/missing: there is no such folder; make it first\n")


@pytest.mark.parametrize("option", ["--report", "--output", "--attest", "--attack-state"])
def test_what_is_written_inside_of_a_proxy_would_be_sent(job: Path, option: str, tmp_path: Path) -> None:
    proxy = job / "r1/ann"
    before = proxy.stat().st_mtime_ns
    with nothing_written(proxy):
        outcome = audit(job, option, proxy / "file", *signed_by(job, tmp_path, option))
    assert proxy.stat().st_mtime_ns == before, "an audit would fail the folder for it"
    message = f"fedqsn: error: {option}: is inside of the proxy {proxy}; keep it elsewhere\n"
    assert (outcome.code, outcome.err) == (2, message)


def test_quiet_prints_the_verdict_and_json_one_document(job: Path) -> None:
    assert audit(job, "--quiet").out == "passed\n"
    assert json.loads(audit(job, "--json").out) == json.loads(audit(job, "--format", "json").out)
    assert audit(job, "--json", "--format", "sarif").code == 2
    assert audit(job, "--json", "--quiet").code == 2


def test_a_policy_is_written_once(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    assert run("audit", "--init-policy", "--policy", path).code == 0
    path.write_text("[limits]\n")
    refused = run("audit", "--init-policy", "--policy", path)
    assert (refused.code, path.read_text()) == (2, "[limits]\n")


def test_the_written_policy_can_be_used_at_once(job: Path, tmp_path: Path) -> None:
    assert run("audit", "--init-policy", "--policy", tmp_path / "p.toml").code == 0
    outcome = audit(job, "--policy", tmp_path / "p.toml")
    assert outcome.code == 3, "the function must have been measured"
    assert "FQ301" in outcome.out and "FQ302" in outcome.out


def test_a_process_ends_with_the_audits_exit_code_and_loads_no_training_library(job: Path) -> None:
    script = (
        "import sys; from fedqsn_cli.cli.app import main; code = main(sys.argv[1:]); "
        "print(code, sorted({'torch', 'transformers', 'bitsandbytes'} & set(sys.modules)))"
    )
    words = ["audit", job / "r1" / "ann", "--truth", job / "global", "-q"]
    started = [sys.executable, "-c", script, *map(str, words)]
    done = subprocess.run(started, env=environment(), capture_output=True, text=True, check=True)
    assert (done.stdout.splitlines(), done.stderr) == (["incomplete", "3 []"], "")


# ------------------------------------------------------------------------------------------------ nothing gets out


@pytest.fixture(scope="module")
def printed(job: Path) -> dict[str, str]:
    """Everything that an audit with all measurements and findings prints, format by format."""
    (job / "strict.toml").write_text(
        "[limits.proxy]\ncosine = 0.1\nexact_share = 0.0\n[limits.tensor]\ncosine = 0.1\n[budget]\nclient = 0.1\n"
    )
    made = {}
    for form in FORMATS:
        words = ["--policy", job / "strict.toml", "--public-base", job / "base", "--format", form]
        outcome = audit(job, *words, "--report", job / "report.html")
        made[form] = outcome.out + outcome.err
    return made | {"html": (job / "report.html").read_text()}


def test_no_format_holds_the_key(job: Path, printed: dict[str, str]) -> None:
    key = job_key.load(job / "job.key").key
    for form, text in printed.items():
        for secret in (key.hex(), key.hex().upper(), base64.b64encode(key).decode()):
            assert secret not in text, form


def test_no_format_holds_a_path(job: Path, printed: dict[str, str]) -> None:
    for form, text in printed.items():
        assert str(job) not in text, form
        plain = re.sub(r"https?://\S+|</?\w[^>]*>|</\w+>", " ", text)
        assert not re.search(r"(?<![\w.])/(?:[\w.-]+/)+[\w.-]+", plain), form


def test_no_format_lists_hidden_positions(job: Path, printed: dict[str, str]) -> None:
    """Positions would be a list of whole numbers, or a string of flags."""
    job = job_key.load(job / "job.key")
    for form, text in printed.items():
        for name, (units, _) in job.groups.items():
            positions = [str(i) for i in np.flatnonzero(hidden_units(job.key, name, units, job.p1))[:4]]
            assert not re.search(r"[\s,;|]+".join(positions), text), form
        if form != "html":
            assert not re.search(r"(?:\b\d+\b,\s+){8,}", text), form
        assert not re.search(r"[01]{32,}", text), form


def test_no_format_holds_a_weight(job: Path, printed: dict[str, str]) -> None:
    for name, (dtype, bits) in read_model(job / "global").items():
        values = [f"{value:.7g}" for value in to_floats(bits.reshape(-1)[:200], dtype)]
        for form, text in printed.items():
            assert not [value for value in values if len(value) >= 9 and value in text], (form, name)
