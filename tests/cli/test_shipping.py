"""What others build on: the action, the commit hooks, the image."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fedqsn_cli import export_proxy, keygen
from fedqsn_cli.cli import commit_hooks
from support.helpers import make_model, search_path, with_sources
from support.processes import SOURCES, environment

ROOT = Path(__file__).parents[2]
POLICY = '[scope]\nrequire = ["invariants"]\n'


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its proxy, key and ledger."""
    home = tmp_path_factory.mktemp("job")
    make_model(home / "global", "bert", hidden=64, inner=128)
    export_proxy(
        home / "global", home / "proxies/{client}", client=["alice"], round=1, key=home / "job.key",
        ledger=home / "ledger.jsonl", p1=0.2, p2=0.1,
    )  # fmt: skip
    return home


def act(job: Path, policy: str, folder: Path) -> tuple[int, dict[str, str]]:
    """Run the audit's step of the action; its exit code and outputs."""
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    (step,) = [one for one in action["runs"]["steps"] if one.get("id") == "audit"]
    (job / "policy.toml").write_text(policy)
    given = {"proxies": "proxies/*", "policy": "policy.toml", "truth": "global", "key": "job.key"}
    given |= {"ledger": "ledger.jsonl", "arguments": ""}
    values = {name: str(text) for name, text in step["env"].items()}
    for name, value in given.items():
        values = {key: text.replace("${{ inputs." + name + " }}", value) for key, text in values.items()}
    values = {key: text.replace("${{ runner.temp }}", str(folder)) for key, text in values.items()}
    assert not any("${{" in text for text in [*values.values(), step["run"]])  # nothing is put into the script
    output = folder / "output"
    environment = os.environ | values | {"GITHUB_OUTPUT": str(output), "PATH": search_path(folder / "bin")}
    environment["PYTHONPATH"] = with_sources(SOURCES)
    done = subprocess.run(["bash", "-e", "-c", step["run"]], cwd=job, env=environment, capture_output=True, text=True)
    return done.returncode, dict(line.split("=", 1) for line in output.read_text().splitlines())


def test_the_action_tells_the_verdict_and_fails_as_the_audit_does(job: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    code, told = act(job, POLICY, tmp_path / "a")
    assert (code, told["verdict"]) == (0, "passed") and Path(told["sarif"]).exists()
    (tmp_path / "b").mkdir()
    code, told = act(job, POLICY + "[budget]\nclient = 0.1\n", tmp_path / "b")
    assert (code, told["verdict"]) == (1, "over the limits") and Path(told["sarif"]).exists()


def test_the_hooks_name_what_there_is() -> None:
    for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text()):
        words = hook["entry"].split()
        assert words[:3] == ["python", "-m", "fedqsn_cli.cli.commit_hooks"] and words[3] in commit_hooks.HOOKS


def test_keys_and_job_files_stop_a_commit(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keygen(tmp_path / "owner.key")
    bad = [job / "job.key", job / "ledger.jsonl", job / "ledger.jsonl.head", tmp_path / "owner.key"]
    bad += [job / "proxies/alice/proxy.json"]
    (tmp_path / "empty").touch()
    good = [tmp_path / "owner.pub", tmp_path / "empty", job / "global/model.safetensors", ROOT / "README.md"]
    assert commit_hooks.main(["secrets", *map(str, [*bad, *good])]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(bad) and all("take it out of the commit" in line for line in lines)
    assert commit_hooks.main(["secrets", *map(str, good)]) == 0
    renamed = shutil.copy(job / "job.key", tmp_path / "notes.txt")
    assert commit_hooks.main(["secrets", str(renamed)]) == 1


@pytest.mark.parametrize(
    "disguise",
    [
        lambda data: data,
        lambda data: b"x" * (1 << 21) + b"\n" + data,  # behind much else
        lambda data: data.replace(b'":', b'" :\n'),  # written by another program
    ],
)
def test_git_refuses_a_commit_with_a_key_in_it(job: Path, tmp_path: Path, disguise: Callable[[bytes], bytes]) -> None:
    """A real repository; its hook does what pre-commit does: it passes the files of the commit to the entry."""
    (secrets,) = [
        one for one in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text()) if one["id"] == "fedqsn-secrets"
    ]
    repository = tmp_path / "repository"
    environment = os.environ | {"PATH": search_path(tmp_path / "bin"), "PYTHONPATH": with_sources(SOURCES)}
    environment |= {f"GIT_{who}_{what}": "x@y" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        words = ("git", "-C", str(repository), *words)
        return subprocess.run(words, env=environment, capture_output=True, text=True)

    repository.mkdir()
    assert git("init").returncode == 0
    hook = repository / ".git/hooks/pre-commit"
    hook.write_text(f"#!/bin/sh\ngit diff --cached --name-only --diff-filter=d -z | xargs -0 {secrets['entry']}\n")
    hook.chmod(0o755)
    (repository / "notes.txt").write_text("nothing\n")
    assert git("add", ".").returncode == git("commit", "-m", "good").returncode == 0
    (repository / "more").mkdir()
    (repository / "more/a b.txt").write_bytes(disguise((job / "job.key").read_bytes()))
    git("add", ".")
    refused = git("commit", "-m", "bad")
    assert refused.returncode != 0 and "a b.txt: is a job's key" in refused.stderr
    assert git("log", "--format=%s").stdout == "good\n"


def test_a_policy_with_a_mistake_stops_a_commit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(POLICY)
    assert commit_hooks.main(["policy", str(path), str(ROOT / "examples/courier/policy.toml")]) == 0
    path.write_text("[budgets]\n")
    assert commit_hooks.main(["policy", str(path)]) == 1
    assert "did you mean budget?" in capsys.readouterr().err
    assert commit_hooks.main([]) == commit_hooks.main(["other"]) == 2


def pip_words() -> list[list[str]]:
    """The arguments of pip in the Dockerfile's first RUN."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text())
    (line,) = [line for line in text.splitlines() if line.startswith("RUN python -m pip")]
    return [part.split()[3:] for part in line.removeprefix("RUN ").split(" && ") if "pip install" in part]


def test_the_image_runs_as_nobody_and_installs_no_torch() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert lines.index("USER fedqsn") < lines.index('ENTRYPOINT ["fedqsn"]')
    first, second = pip_words()
    assert "torch" not in first and "transformers" not in first and "--no-deps" in second


def test_the_image_has_every_package_that_the_owners_commands_import() -> None:
    program = (
        "import sys; from importlib.metadata import packages_distributions; "
        "from fedqsn_cli import audit, export_proxy, keygen, mask, merge, quantize, seal, unseal, verify; "
        "print(*(name for key, names in packages_distributions().items() if key in sys.modules for name in names))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    needed = {re.split("[>=]", dependency)[0] for dependency in named} & set(done.stdout.split())
    assert {"blake3", "numba"} <= needed <= set(pip_words()[0])


@pytest.mark.soak
def test_the_steps_of_the_image_make_an_environment_that_masks_and_audits(job: Path, tmp_path: Path) -> None:
    """No container runtime is needed for that: the same steps, in an environment of its own."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "image"], check=True)
    python = tmp_path / "image/bin/python"
    for words in pip_words():
        here = [word.replace("/source/", f"{ROOT}/") if word.startswith("/source") else word for word in words]
        here = [str(ROOT) if word == "/source" else word for word in here]
        subprocess.run([python, "-m", "pip", *here, "--disable-pip-version-check"], check=True, capture_output=True)
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    common = ["--key", job / "job.key", "--ledger", job / "ledger.jsonl"]
    for words in (
        ["keygen", tmp_path / "owner.key"],
        ["export-proxy", job / "global", "--out", tmp_path / "p", "--client", "bob", "--round", "2", "--p2", "0.1",
         "--sign", tmp_path / "owner.key", *common],
        ["audit", tmp_path / "p", "--truth", job / "global", "--verify-key", tmp_path / "owner.pub", *common],
        ["seal", tmp_path / "p", "--to", tmp_path / "owner.pub", "--out", tmp_path / "p.sealed"],
    ):  # fmt: skip
        done = subprocess.run(
            [tmp_path / "image/bin/fedqsn", *map(str, words)], env=clean, capture_output=True, text=True
        )
        assert done.returncode == 0, (words, done.stdout, done.stderr)
    listed = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    assert "torch" not in listed
