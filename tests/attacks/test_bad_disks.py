"""Every command on a full disk, and in a folder that it may not write: one line, the old state, the same end later."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from attacks.killing import COMMANDS, Trial, check_end, check_visible, make_place
from fedqsn_cli.checkpoint.files import remove_tree
from support import disks
from support.attacks import World
from support.forks import fork
from support.helpers import contents
from support.made_once import made_once
from support.processes import Outcome, run

NOBODY = 65534
QUICK = ("mask", "export-proxy", "merge", "client-train", "audit")  # one for each way to write; soak has them all
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.soak) for name in COMMANDS]


def make(folder: Path) -> None:
    """Fill an empty folder."""
    make_place(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(made_once(tmp_path_factory, "bad-disks", make))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disks.small_disk(tmp_path, "16m") as disk:
        yield disk


@pytest.fixture
def readable() -> Iterator[Path]:
    """A folder that every user can reach; those of pytest are closed."""
    if os.geteuid():
        pytest.skip("becoming another user takes root")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def undisturbed(trial: Trial, here: Path) -> dict[str, bytes]:
    """All files after the command; `here` is gone again."""
    trial.fresh(here)
    assert run(*trial.words(here)).code in (0, 4)
    after = trial.state(here)
    shutil.rmtree(here)
    return after


def fill(disk: Path, free: int) -> Path:
    """A file that leaves so many bytes of a disk free."""
    filler = disk / "filler"
    found = os.statvfs(disk)
    with filler.open("wb") as file:
        file.write(bytes(found.f_bavail * found.f_frsize - free))
    return filler


@pytest.mark.parametrize("name", ALL)
def test_a_full_disk_leaves_the_old_state_and_running_again_ends_the_work(
    name: str, world: World, small_disk: Path
) -> None:
    trial, here = Trial(world, name), small_disk / "here"
    after = undisturbed(trial, here)
    needed = sum(len(data) for data in after.values())
    refusals = 0
    for share in (0.0, 0.02, 0.3, 0.7):
        before = trial.state(trial.fresh(here))
        filler = fill(small_disk, int(share * needed))
        ended = run(*trial.words(here))
        check_visible(trial, here, before, after)
        assert not [path for path in here.iterdir() if path.is_dir() and path.name.startswith(".")]
        if ended.code not in (0, 4):
            refusals += 1
            assert ended.code == 2, ended
            assert ended.err.splitlines()[-1].startswith("fedqsn: error: "), ended
            assert "No space left" in ended.err, ended
        filler.unlink()
        check_end(trial, here, after)
        shutil.rmtree(here)
    assert refusals


def test_a_ledger_on_a_full_disk_keeps_its_lines_and_no_proxy_is_published(world: World, small_disk: Path) -> None:
    trial, here = Trial(world, "export-proxy"), small_disk / "here"
    out = small_disk.parent / "out"
    out.mkdir()
    words = [word.replace(f"{here}/{{client}}", f"{out}/{{client}}") for word in trial.words(here)]
    before = contents(trial.fresh(here))
    filler = fill(small_disk, 0)

    ended = run(*words)

    found = contents(here)
    assert (ended.code, list(out.iterdir())) == (2, [])
    assert "No space left" in ended.err
    filler.unlink()
    assert run(*words).code == 0
    after = contents(here)
    assert after["ledger.jsonl"].startswith(before["ledger.jsonl"])
    assert len(list(out.iterdir())) == 3
    assert found.pop("ledger.jsonl") in (
        before.pop("ledger.jsonl"),
        after["ledger.jsonl"],
    )  # lines come before the head
    assert found == before


def as_nobody(work: Callable[[], Outcome], told: Path) -> Outcome:
    """Do something as an ordinary user, in a copy of this process that has imported everything."""
    told.touch()
    os.chown(told, NOBODY, NOBODY)

    def child() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        ended = work()
        told.write_text(json.dumps([ended.code, ended.out, ended.err]))

    assert fork(child).wait() == 0
    return Outcome(*json.loads(told.read_text()))


def give_away(folder: Path, mode: int) -> None:
    """Make nobody the owner of a folder and all files in it; the folder has this mode."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    os.chmod(folder, mode)


@pytest.mark.parametrize("name", ALL)
def test_a_folder_that_an_ordinary_user_may_not_write_is_left_as_it_is(name: str, world: World, readable: Path) -> None:
    own = World(shutil.copytree(world.root, readable / "world"))
    os.chmod(own.root, 0o755)
    trial, here = Trial(own, name), readable / "here"
    undisturbed(trial, here)
    before = contents(trial.fresh(here))
    give_away(here, 0o555)

    ended = as_nobody(lambda: run(*trial.words(here)), readable / "told")

    assert ended.code == 2, ended
    assert ended.err.splitlines()[-1].startswith("fedqsn: error: "), ended
    assert "Permission denied" in ended.err, ended
    assert contents(here) == before


def test_a_ledger_that_an_ordinary_user_may_not_write_stops_an_export(world: World, readable: Path) -> None:
    own = World(shutil.copytree(world.root, readable / "world"))
    os.chmod(own.root, 0o755)
    trial, here = Trial(own, "export-proxy"), readable / "here"
    undisturbed(trial, here)
    before = contents(trial.fresh(here))
    give_away(here, 0o755)
    for name in ("ledger.jsonl", "ledger.jsonl.head"):
        os.chmod(here / name, 0o444)
    remove_tree(readable / "told")

    ended = as_nobody(lambda: run(*trial.words(here)), readable / "told")

    assert (ended.code, contents(here)) == (2, before), ended
    assert "ledger.jsonl" in ended.err and "Permission denied" in ended.err, ended
