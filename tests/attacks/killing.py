"""Kill a command at random instants, run it again, and compare all that is on the disk with a run that was left alone.

    python -m attacks.killing merge --kills 200 --seed 1

Everything visible is complete after each kill: an output is not there, or is what the undisturbed run makes; the ledger
is the one before or the one after. The same command then ends the work, byte for byte, and leaves nothing else behind.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fedqsn_cli.cli.app import run as run_here
from support.attacks import World, make_world
from support.courier import make_desk
from support.helpers import contents
from support.processes import run

TRAIN = "client-train {world}/proxy --out {here}/update --data {world}/data.jsonl --max-steps 6 --batch-size 4"
JOB = "--key {here}/job.key --ledger {here}/ledger.jsonl"
CONSOLIDATE = (
    "consolidate {world}/model {world}/server --out {here}/student --key {here}/job.key "
    "--own-data {world}/data.jsonl --transfer-data {world}/data.jsonl --steps 3 --batch-size 4"
)

COMMANDS = {
    "mask": "mask {world}/model --out {here}/server --key {here}/job.key",
    "quantize": "quantize {world}/server --out {here}/quantized --format nf4",
    "export-proxy": "export-proxy {world}/quantized --out {here}/{{client}} --client ann --client bob --client cat "
    "--round 2 --p2 0.25 " + JOB,
    "client-train": TRAIN + " --update-format nf4 --residual {here}/residual",
    "client-train --save-every": TRAIN + " --save-every 1",
    "merge": "merge {world}/model {world}/update --out {here}/merged " + JOB,
    "merge --partial": "merge {world}/model {world}/update --partial --out {here}/sum " + JOB,
    "merge --restore": "merge {world}/model --restore {world}/server --out {here}/restored --key {here}/job.key",
    "consolidate": CONSOLIDATE,
    "consolidate --save-every": CONSOLIDATE + " --save-every 1",
    "audit": "audit {world}/proxy --truth {world}/model --report {here}/report.html --output {here}/audit.json "
    "--format json " + JOB,
    "courier pack": "courier pack {desk}/courier {desk}/out-1/alice {desk}/out-1/bob --out {here}/outbox "
    "--key {desk}/owner.key --attestation {desk}/1.json --ledger {desk}/ledger",
}
SEALED = {"courier pack"}  # encrypted under keys that are drawn: only names and sizes are the same each time
_SIGNATURE = re.compile(rb'"sig":\s*"[^"]*"')  # in DER, whose length differs by some bytes


@dataclass
class Trial:
    """One command of a job, in a folder with the job's key and ledger."""

    world: World
    name: str

    def words(self, here: Path) -> list[str]:
        return (
            COMMANDS[self.name]
            .format(world=self.world.root, desk=self.world.root / "desk/strongroom", here=here)
            .split()
        )

    def fresh(self, here: Path) -> Path:
        """A folder as it is before the command."""
        here.mkdir()
        for name in ("job.key", "ledger.jsonl", "ledger.jsonl.head"):
            shutil.copy2(self.world.root / name, here / name)
        return here

    def state(self, here: Path) -> dict[str, bytes]:
        """All files of the folder, by name."""
        found = contents(here)
        if self.name not in SEALED:
            return found
        return {name: bytes(len(_SIGNATURE.sub(b"", data))) for name, data in found.items()}

    def start(self, here: Path) -> int:
        """Start the command in a copy of this process. Returns its process id."""
        child = os.fork()
        if child:
            return child
        code = 70
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            code = run_here(self.words(here))
        finally:
            os._exit(code)


def make_place(root: Path) -> World:
    """A job, and the desk of an owner with a courier in it."""
    world = make_world(root)
    make_desk(root / "desk")
    return world


def check_visible(trial: Trial, here: Path, before: dict[str, bytes], after: dict[str, bytes]) -> None:
    """Fail where something that has its own name is neither as before nor as after the command."""
    found = {name: data for name, data in trial.state(here).items() if not name.startswith(".")}
    for name, data in found.items():
        if not name.endswith(".next"):  # a residual that waits for its update
            assert data in (before.get(name), after.get(name)), f"{name} is torn"
    for folder in {name.split("/")[0] for name in found if "/" in name}:
        missing = {name for name in after if name.startswith(f"{folder}/")} - found.keys()
        assert not missing, f"{folder} lacks {sorted(missing)}"


def check_end(trial: Trial, here: Path, after: dict[str, bytes]) -> None:
    """Run the command again, and fail where the folder is not as after an undisturbed run."""
    ended = run(*trial.words(here))
    assert ended.code in (0, 4) or "already exists" in ended.err, ended
    rest = trial.state(here)
    unlike = sorted(name for name in rest.keys() | after.keys() if rest.get(name) != after.get(name))
    assert not unlike, f"another end: {unlike}"
    folders = [path.name for path in here.iterdir() if path.is_dir() and path.name.startswith(".")]
    assert not folders, folders


def killed(trial: Trial, here: Path, after: dict[str, bytes], seconds: float) -> str:
    """Kill the command after some time, end its work, and compare. Returns what was found after the kill."""
    before = trial.state(trial.fresh(here))
    child = trial.start(here)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    was_killed = os.WIFSIGNALED(status)
    check_visible(trial, here, before, after)
    found = (
        "ended before" if not was_killed else "old state" if trial.state(here) == before else "leftovers or new state"
    )
    check_end(trial, here, after)
    shutil.rmtree(here)
    return found if was_killed else "ended before"


def kills(name: str, world: World, scratch: Path, count: int, seed: int) -> Counter[str]:
    """Kill a command so often. Returns how often what was found."""
    trial, draw, here = Trial(world, name), random.Random(seed), scratch / "here"  # one path: some files name it
    for _ in range(2):  # the first time some code is compiled
        trial.fresh(here)
        started = time.monotonic()
        _, status = os.waitpid(trial.start(here), 0)
        took = time.monotonic() - started
        assert os.waitstatus_to_exitcode(status) in (0, 4), f"{name} ends with {os.waitstatus_to_exitcode(status)}"
        after = trial.state(here)
        shutil.rmtree(here)
    counts = Counter[str]()
    for _ in range(count):
        start = draw.choice((0.0, 0.0, 0.8 * took))  # a third while it writes, which most commands do at their end
        found = killed(trial, here, after, draw.uniform(start, 1.05 * took))
        counts[found] += 1
        took *= 0.95 if found == "ended before" else 1.005  # a machine is not equally busy all the time
    return counts


def main() -> int:
    """Kill one command, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", default=list(COMMANDS))
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    import torch
    import transformers  # noqa: F401 - copies of this process have it

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory() as folder:
        world = make_place(Path(folder) / "world")
        for number, name in enumerate(asked.commands):
            (scratch := Path(folder) / str(number)).mkdir()
            counts = kills(name, world, scratch, asked.kills, asked.seed)
            print(json.dumps({"command": name, "kills": asked.kills, **counts}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
