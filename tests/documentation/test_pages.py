"""Every command that README and docs show is run here, on a tiny model."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from fedqsn_cli.cli.app import COMMANDS, build
from support.articles import write_encoder, write_rows
from support.made_once import made_once
from support.scripts import Scripts

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
QUICKSTART = ROOT / "examples" / "quickstart"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), QUICKSTART / "README.md"]
ELSEWHERE = {README, ROOT / "docs" / "courier.md"}  # below; tests/courier looks after commands that are daemons
LEAST = {"audit.md": 7, "choosing.md": 11, "formats.md": 3, "merging.md": 4, "security.md": 16, "training.md": 6}


def bash_blocks(page: Path) -> list[str]:
    """The fenced bash blocks of a page, in order."""
    return re.findall(r"^```bash\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def scripts_of(page: Path) -> list[str]:
    """The blocks of a page without the lines that set up or call targets of make; other tests look after those."""
    elsewhere = re.compile(r"\s*(#|$|python -m pip\b|([A-Z0-9_]+=\S+ )*(make\b|\./run\.sh))")
    blocks = (
        "\n".join(line for line in block.splitlines() if not elsewhere.match(line)) for block in bash_blocks(page)
    )
    return [block for block in blocks if block]


def commands_of(page: Path) -> int:
    """How many `fedqsn` commands the blocks of a page hold."""
    return sum(len(re.findall(r"^ *fedqsn ", block, re.MULTILINE)) for block in scripts_of(page))


def run_all(page: Path, desk: Path, scripts: Scripts, shell: dict[str, str]) -> None:
    """Run the blocks of a page, in order. A tiny random model leaks too much, or has no skill: a policy may say so."""
    for block in scripts_of(page):
        done = scripts.run(["bash", "-euo", "pipefail", "-c", block], desk, shell)
        assert done.code in ((0, 1, 3) if "--policy " in block else (0,)), f"{block}\n{done.out}\n{done.err}"


@pytest.fixture
def played(tmp_path_factory: pytest.TempPathFactory, scripts: Scripts, shell: dict[str, str]) -> Path:
    """A folder with global/, base/, everybody's data, and what the commands of the README made of them."""

    def play(folder: Path) -> None:
        write_encoder(folder / "global", head=True)
        write_encoder(folder / "base", head=False, seed=1)
        for name, count in {"alice": 24, "bob": 24, "dev": 24, "public": 8}.items():
            write_rows(folder / f"{name}.jsonl", count)
        run_all(README, folder, scripts, shell)

    return made_once(tmp_path_factory, "readme", play)


def test_every_command_of_the_readme_runs(played: Path) -> None:
    assert commands_of(README) >= 16  # fewer: it has lost its commands, or they are no longer found
    assert (played / "global-1" / "fedqsn.json").is_file() and (played / "final" / "fedqsn.json").is_file()


@pytest.mark.usefixtures("short_attacks")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if commands_of(page) and page not in ELSEWHERE], ids=lambda page: page.name
)
def test_every_command_of_a_page_runs(
    page: Path, played: Path, scripts: Scripts, shell: dict[str, str], tmp_path: Path
) -> None:
    """In a folder in which the commands of the README were run before."""
    shutil.copytree(played, tmp_path / "desk")
    run_all(page, tmp_path / "desk", scripts, shell)


@pytest.mark.parametrize("page", LEAST)
def test_no_page_has_lost_its_commands(page: str) -> None:
    assert commands_of(ROOT / "docs" / page) >= LEAST[page]


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
