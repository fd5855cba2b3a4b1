"""Options on the command line: former names, and what the environment gives."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import get_args

import pytest

from cli.conftest import Round
from fedqsn_cli.artifacts import manifests
from fedqsn_cli.artifacts.ledger import Release
from fedqsn_cli.artifacts.manifests import Quantization, UpdateManifest
from fedqsn_cli.auditing import report
from fedqsn_cli.cli.app import COMMANDS, help_of
from fedqsn_cli.cli.command import build, function_of, options_classes
from fedqsn_cli.cli.views import AuditView
from fedqsn_cli.options import ExportOptions, Options, QuantizeOptions, TrainOptions, options_of
from fedqsn_cli.options.groups import PRESETS, SIGNATURES
from fedqsn_cli.planning.placement import WHERE
from fedqsn_cli.planning.tensor_plan import MASK_AXES
from fedqsn_cli.quantization.codebooks import FORMATS
from support.processes import process, run

FORMER = {
    "mask": {"--plan": "--plan-file"},
    "quantize": {"--plan": "--plan-file"},
    "export-proxy": {"--plan": "--plan-file"},
    "inspect": {"--plan": "--show-plan", "--overrides": "--plan-file"},
    "audit": {"--base": "--public-base"},
}


@pytest.mark.parametrize("command", COMMANDS)
def test_former_names_are_these_and_no_help_shows_them(command: str) -> None:
    assert build(command).former == FORMER.get(command, {})
    words = help_of(command).replace("\n", " ").split(" ")
    assert not set(FORMER.get(command, {})) & set(words)


@pytest.mark.parametrize(
    "line",
    [
        "mask model --out out --key job.key --plan-file plan.toml",
        "quantize model --out out --format nf4 --plan-file plan.toml",
        "export-proxy model --out out --client a --round 1 --p2 0.1 --key k --ledger l --plan-file plan.toml",
        "inspect model --show-plan --plan-file plan.toml",
        "audit proxy --truth model --public-base base",
    ],
)
def test_a_former_name_means_the_same(line: str) -> None:
    command, *words = shlex.split(line)
    former = {now: name for name, now in FORMER[command].items()}
    context = build(command).make_context(command, list(words))
    assert build(command).make_context(command, [former.get(word, word) for word in words]).params == context.params


def test_a_former_name_is_neither_suggested_nor_completed() -> None:
    assert "no such option --override; did you mean --plan-file?" in run("inspect", "model", "--override", "x").err
    words = {"_FEDQSN_COMPLETE": "complete_bash", "COMP_WORDS": "fedqsn inspect --", "COMP_CWORD": "2"}
    completed = process(**words).out.split()
    assert {"--show-plan", "--plan-file"} <= set(completed)
    assert not {"--plan", "--overrides"} & set(completed)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_every_command_of_a_job_needs_may_come_from_the_environment(command: str) -> None:
    options = options_of(options_classes(function_of(command))["options"])
    known = [declared for declared in options if declared.option.panel != SIGNATURES]  # where a key is somebody's own
    variables = {declared.name: declared.option.env for declared in known if declared.option.env}
    expected = {
        "key": "FEDQSN_KEY",
        "ledger": "FEDQSN_LEDGER",
        "allow_untrainable": "FEDQSN_ALLOW_UNTRAINABLE",
    }
    assert variables == {name: expected[name] for name in (declared.name for declared in known) if name in expected}
    for variable in variables.values():
        assert f"[env: {variable}]" in help_of(command)


def test_the_environment_gives_key_and_ledger(played: Round, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDQSN_KEY", str(played.folder / "job.key"))
    monkeypatch.setenv("FEDQSN_LEDGER", str(tmp_path / "ledger.jsonl"))
    words = ["--client", "dan", "--round", "1", "--p2", "0.25", "-q"]
    exported = run("export-proxy", played.folder / "server", "--out", tmp_path / "proxy", *words)
    assert (exported.code, exported.err) == (0, "")
    assert (tmp_path / "ledger.jsonl").is_file()
    assert run("audit", "-q").code == 0


def test_an_option_wins_over_the_environment(played: Round, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDQSN_KEY", str(tmp_path / "nowhere" / "job.key"))
    key = played.folder / "job.key"
    masked = run("mask", played.folder / "global", "--out", tmp_path / "server", "--key", key, "-q")
    assert (masked.code, masked.err) == (0, "")


def test_an_empty_variable_is_not_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDQSN_KEY", "")
    outcome = run("mask", "model", "--out", tmp_path / "out", "--p1", "0.1")
    assert outcome.err == "fedqsn: error: missing --key (or set FEDQSN_KEY); see 'fedqsn mask --help'\n"


def test_an_option_that_is_empty_is_not_replaced_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDQSN_KEY", str(tmp_path / "job.key"))
    outcome = run("mask", "model", "--out", tmp_path / "out", "--key", "", "--p1", "0.1")
    assert outcome.err.startswith("fedqsn: error: --key: is empty;")


def test_the_words_that_options_take_are_those_that_the_code_knows() -> None:
    def words(cls: type[Options], name: str) -> set[str]:
        return {word for declared in options_of(cls) if declared.name == name for word in declared.choices}

    quantization = Quantization.model_fields
    assert words(QuantizeOptions, "format") == set(FORMATS)
    assert words(QuantizeOptions, "format") - {"none"} == set(get_args(quantization["format"].annotation))
    assert words(QuantizeOptions, "layout") == set(get_args(quantization["layout"].annotation))
    assert words(ExportOptions, "axis") == set(MASK_AXES)
    assert words(ExportOptions, "where") == set(WHERE)
    assert words(ExportOptions, "fill") == set(get_args(manifests.Fill))
    assert words(ExportOptions, "schedule") == set(get_args(Release.model_fields["schedule"].annotation))
    assert words(ExportOptions, "preset") == set(PRESETS)
    assert words(TrainOptions, "update_format") == set(get_args(UpdateManifest.model_fields["precision"].annotation))
    assert words(AuditView, "format") == set(report.FORMATS)
