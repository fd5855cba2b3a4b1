"""What examples/ci shows is something that fedqsn accepts, and a gate that stops."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from fedqsn_cli import mask
from fedqsn_cli.cli.app import build
from support.helpers import make_model, search_path, with_sources
from support.processes import SOURCES

CI = Path(__file__).parents[2] / "examples" / "ci"


def commands(text: str) -> list[list[str]]:
    """All fedqsn commands of a script, word by word, with something in place of variables."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = re.findall(r"^\s*(fedqsn .*)$", joined, re.MULTILINE)
    return [shlex.split(re.sub(r"\$\{?\w+\}?", "1", line), comments=True)[1:] for line in found]


def scripts() -> dict[str, str]:
    github = yaml.safe_load((CI / "github.yml").read_text())
    gitlab = yaml.safe_load((CI / "gitlab.yml").read_text())
    steps = [step.get("run", "") for job in github["jobs"].values() for step in job["steps"]]
    lines = [line for job in gitlab.values() for line in job["script"]]
    return {"github": "\n".join(steps), "gitlab": "\n".join(lines)}


@pytest.mark.parametrize("system", ["github", "gitlab"])
def test_every_command_of_a_workflow_is_one_that_fedqsn_accepts(system: str) -> None:
    found = commands(scripts()[system])
    assert [words[0] for words in found] == ["export-proxy", "audit", *(["seal"] if system == "github" else [])]
    for words in found:
        build(words[0]).make_context(f"fedqsn {words[0]}", words[1:])


def test_a_workflow_hands_out_sealed_files_and_keeps_the_rest_on_the_runner() -> None:
    """What is uploaded can be read by everybody who can read the repository."""
    (job,) = yaml.safe_load((CI / "github.yml").read_text())["jobs"].values()
    steps = job["steps"]
    uploaded = [step["with"]["path"].split() for step in steps if "upload-artifact" in step.get("uses", "")]
    assert uploaded == [["sealed/", "audit.intoto.json"]]
    (checkout,) = [step for step in steps if "checkout" in step.get("uses", "")]
    assert checkout["with"]["persist-credentials"] is False
    assert steps[-1]["if"] == "always()" and "rm -rf proxies" in steps[-1]["run"]
    assert not any("${{" in step.get("run", "") for step in steps)


def test_the_job_for_gitlab_is_one_command_a_line_and_keeps_the_report_on_the_runner() -> None:
    job = yaml.safe_load((CI / "gitlab.yml").read_text())["release-proxies"]
    assert all(line.startswith("fedqsn ") and "\\" not in line for line in job["script"])
    assert "paths" not in job["artifacts"] and job["artifacts"]["access"] == "developer"


@pytest.fixture
def desk(folder: Path) -> tuple[Path, dict[str, str]]:
    make_model(folder / "global", "bert", hidden=64, inner=128)
    shutil.copy(CI / "Makefile", folder / "Makefile")
    (folder / "policy.toml").write_text('[scope]\nrequire = ["invariants", "exposure"]\n[budget]\nclient = 0.9\n')
    mask(str(folder / "global"), folder / "server", key=folder / "job.key", p1=0.25)
    environment = os.environ | {"PATH": search_path(folder / "bin"), "PYTHONPATH": with_sources(SOURCES)}
    return folder, environment


@pytest.mark.long
def test_the_makefile_releases_what_passes_and_stops_what_does_not(desk: tuple[Path, dict[str, str]]) -> None:
    folder, environment = desk

    def make(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["make", *words], cwd=folder, env=environment, capture_output=True, text=True)

    passed = make("release", "ROUND=1")
    assert passed.returncode == 0, passed.stderr
    assert (folder / "r1" / "released").exists() and (folder / "r1" / "report.html").exists()
    (folder / "policy.toml").write_text("[budget]\nclient = 0.5\n")
    failed = make("release", "ROUND=2")
    assert failed.returncode != 0
    assert "Error 1" in failed.stderr
    assert (folder / "r2" / "alice").exists() and not (folder / "r2" / "released").exists()
