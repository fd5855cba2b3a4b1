"""examples/choosing: the recipe plays its jobs, and its table says what the commands measured."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from support.families import build
from support.scripts import Scripts
from support.training_jobs import labelled

ROOT = Path(__file__).parents[2]
CHOOSING = ROOT / "examples" / "choosing"


@pytest.fixture(scope="module")
def report() -> ModuleType:
    """report.py as a module."""
    spec = importlib.util.spec_from_file_location("choosing_report", CHOOSING / "report.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def evaluation(accuracy: float | None, loss: float = 1.0, perplexity: float | None = None) -> dict[str, float | None]:
    return {"accuracy": accuracy, "loss": loss, "perplexity": perplexity}


def test_the_table_has_a_row_for_each_job_in_the_order_of_p1(
    report: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {"<my> model": evaluation(0.5)}
    for p1, rho in (("1", 0.0), ("0.5", 0.64), ("0", None)):
        job = tmp_path / f"p1-{p1}"
        job.mkdir()
        (job / "mask.json").write_text(json.dumps({"hidden": float(p1) * 0.9}))
        (job / "audit.json").write_text(json.dumps({"function": {"rho": rho} if rho is not None else None}))
        scores |= {str(job / "restored"): evaluation(float(p1)), str(job / "consolidated"): evaluation(None, 2, 7.4)}
    for skill in ("own", "other"):
        (tmp_path / f"{skill}.json").write_text(json.dumps(scores))
    report.main([str(tmp_path), "--global", "<my> model"])
    lines = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()[1:6]]
    assert lines[1] == ["your model", "-", "-", "50.0 %", "-", "50.0 %", "-"]
    assert [line[0] for line in lines[2:]] == ["0", "0.5", "1"]
    assert lines[3] == ["0.5", "45.0 %", "64.0 %", "50.0 %", "7.4 ppl", "50.0 %", "7.4 ppl"]
    page = (tmp_path / "frontier.html").read_text()
    assert page.count("<tr>") == 5 and "64.0 %" in page


@pytest.mark.timeout(600)
def test_the_recipe_plays_a_job_and_keeps_it(shell: dict[str, str], scripts: Scripts, tmp_path: Path) -> None:
    for name, seed in (("global", 3), ("base", 11)):
        build("bert", tmp_path / name, tokenizer=True, seed=seed)
    data = str(labelled(tmp_path / "data.jsonl"))
    settings = {"GLOBAL": "global", "BASE": "base", "OWN": data, "OTHER": data, "TRANSFER": data, "P1S": "1"}
    small = {"CLIENTS": "1", "ROUNDS": "1", "STEPS": "2", "MINUTES": "0.001", "MAX_LENGTH": "16"}
    shown = []
    for _ in range(2):
        done = scripts.run([str(CHOOSING / "run.sh")], tmp_path, shell | settings | small)
        assert done.code == 0, done.err
        shown.append(done.out)
    job = tmp_path / "work" / "p1-1"
    assert json.loads((job / "audit.json").read_text())["function"]["scores"]
    table = shown[0][shown[0].index("your model") :].splitlines()
    assert re.match(r" +1 +100.0 % +(-|-?[\d.]+ %)( +[\d.]+ %){4}$", table[1]), table
    assert "p1 = 1" in shown[0] and "p1 = 1" not in shown[1], "what is complete is kept"
    assert {path.name for path in (tmp_path / "work" / "data").iterdir()} >= {"own.jsonl", "client-1.jsonl"}
    assert not (tmp_path / "work" / "unfinished").exists()
