"""Presets are bundles of defaults: what is given wins, and a job that goes on has one of each all the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedqsn_cli import export_proxy, mask
from fedqsn_cli.artifacts.ledger import read
from fedqsn_cli.errors import InputError, KeyFileError
from fedqsn_cli.masks import job_key
from fedqsn_cli.options import ExportOptions
from fedqsn_cli.options.groups import PRESETS
from support.deep_models import deep_model as model
from support.helpers import contents, nothing_written
from support.processes import run


def job(folder: Path, client: str = "ann", number: int = 1) -> dict[str, Any]:
    files = {"key": folder / "job.key", "ledger": folder / "ledger.jsonl"}
    return {"client": [client], "round": number, "p2": 0.2, **files}


def chosen(**options: Any) -> dict[str, Any]:
    """The options that a preset may set, as they are once a preset has filled them in."""
    made = ExportOptions("out", client=["ann"], round=1, p2=0.2, key="job.key", ledger="ledger.jsonl", **options)
    return {name: getattr(made, name) for name in ("fill", "where", "p1", "schedule", "train")}


def test_what_is_given_wins_over_a_preset() -> None:
    unset = dict.fromkeys(chosen())
    strong = {"preset": "strong", "public_base": "b"}
    assert chosen(preset="paper") == unset | PRESETS["paper"]
    given = {"fill": "zero", "where": "mlp", "p1": 0.0, "schedule": "fresh"}
    assert chosen(preset="strong", **given) == unset | given
    assert chosen(p1=0.9, **strong) == PRESETS["strong"] | {"p1": 0.9}
    assert chosen(train="visible", **strong)["train"] == "visible"
    assert chosen(p1=0.9) == unset | {"p1": 0.9}


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(InputError, match="--preset: 'weak' is not a choice; choose from paper, strong"):
        chosen(preset="weak")


def test_paper_is_the_same_as_its_options(folder: Path) -> None:
    source = model(folder / "model")
    export_proxy(str(source), folder / "one", preset="paper", p1=0.3, **job(folder))
    export_proxy(str(source), folder / "two", fill="zero", where="outputs", schedule="fresh", **job(folder))
    assert contents(folder / "one") == contents(folder / "two")
    assert job_key.load(folder / "job.key").overrides == {"rule": [], "where": "outputs"}


def test_strong_is_the_same_as_its_options(folder: Path) -> None:
    source, base = model(folder / "model"), str(model(folder / "base", dtype="F32"))
    export_proxy(str(source), folder / "one", preset="strong", public_base=base, **job(folder))
    options = {"fill": "base", "where": "all", "p1": 0.5, "schedule": "sticky", "train": "all", "public_base": base}
    export_proxy(str(source), folder / "two", **options, **job(folder))
    assert contents(folder / "one") == contents(folder / "two")
    (line,) = read(folder / "ledger.jsonl")
    assert (line.p1, line.schedule, line.fill) == (0.5, "sticky", "base")


def test_a_preset_of_another_job_is_refused(folder: Path) -> None:
    source = model(folder / "model")
    mask(str(source), folder / "server", preset="paper", p1=0.3, key=folder / "job.key")
    with nothing_written(folder), pytest.raises(KeyFileError, match="where outputs, but where all was asked for"):
        export_proxy(str(source), folder / "proxy", preset="strong", public_base=str(source), p1=0.3, **job(folder))


def test_without_a_preset_a_schedule_is_fresh_and_mask_takes_presets_for_clients_too(folder: Path) -> None:
    source = model(folder / "model")
    export_proxy(str(source), folder / "proxy", p1=0.3, **job(folder))
    assert read(folder / "ledger.jsonl")[0].schedule == "fresh"
    mask(str(source), folder / "server", key=folder / "job.key")
    strong = {"key": folder / "job.key", "preset": "strong", "fill": "zero", "p1": 0.3}
    mask(str(folder / "server"), folder / "masked", client="ann", p2=0.2, **strong)  # sticky needs no round


# ---------------------------------------------------------------- through the real command line


def shell(folder: Path, *words: str) -> tuple[int, str]:
    source = folder / "model"
    outcome = run("mask", source, "--out", folder / "server", "--key", folder / "job.key", "--p1", "0.3", *words)
    return outcome.code, outcome.err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--layers", "0-4"], "--layers: the model has no layer 4; it has embeddings,head,0-3"),
        (["--p1-schedule", "9=0.5"], "--p1-schedule: the model has no layer 9; it has embeddings,head,0-3"),
        (["--layers", "head", "--where", "mlp"], "model: the plan masks no tensor; see 'fedqsn inspect --show-plan'"),
    ],
)
def test_what_the_model_does_not_have_is_one_line_and_nothing_is_written(
    folder: Path, words: list[str], line: str
) -> None:
    model(folder / "model")
    with nothing_written(folder):
        code, said = shell(folder, *words)
    assert (code, said.count("\n")) == (2, 1)
    assert line in said


def test_a_second_one_is_one_line(folder: Path) -> None:
    model(folder / "model")
    assert shell(folder, "--where", "outputs", "--layers", "embeddings,0-2", "--p1-schedule", "0=0.9")[0] == 0
    code, said = shell(folder, "--force", "--p1-schedule", "0-1=0.9")
    assert (code, said.count("\n")) == (2, 1)
    assert "belongs to a job with p1 schedule 0=0.9, but p1 schedule 0-1=0.9 was asked for; a job has one" in said


def test_inspect_shows_ratios_and_what_an_option_leaves_visible(folder: Path) -> None:
    model(folder / "model")
    assert shell(folder, "--where", "outputs", "--layers", "embeddings,0-2", "--p1-schedule", "0=0.9")[0] == 0
    lines = run("inspect", folder / "server", "--show-plan").out.splitlines()
    row = {line.split()[0]: line.split() for line in lines if line.strip()}
    assert "0.9" in row["bert.encoder.layer.0.output.dense.weight"]
    assert "0.3" in row["bert.encoder.layer.1.output.dense.weight"]
    assert row["bert.encoder.layer.3.output.dense.weight"][-1] == "--layers"
    assert row["bert.encoder.layer.0.intermediate.dense.weight"][-1] == "--where"
    plan = json.loads(run("inspect", folder / "server", "--show-plan", "--json").out)["plan"]
    assert {each["p1"] for each in plan} == {None, 0.3, 0.9}
    assert "p1 schedule" in run("inspect", folder / "job.key").out
