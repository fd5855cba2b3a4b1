"""I6, all or nothing, for the commands: kill -9 at any instant leaves whole artifacts, and running again ends the work.

The writer's own tests kill it at every instant; here the key, the ledger and the proxies must agree afterwards.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedqsn_cli import export_proxy, mask
from fedqsn_cli.artifacts import ledger
from fedqsn_cli.artifacts.manifests import file_digest
from fedqsn_cli.masks import job_key
from support.helpers import contents, environment, make_model

CLIENTS = ("ann", "bob")

# Exports two proxies, and dies at the point named on the command line.
DYING = """
import os, signal, sys
from pathlib import Path
import fedqsn_cli
from fedqsn_cli.artifacts import ledger
from fedqsn_cli.export import session
from fedqsn_cli.checkpoint import files, writer

point, root = sys.argv[1], Path(sys.argv[2])

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def before(place, name):
    setattr(place, name, die)

def after(place, name, times=1):
    original, left = getattr(place, name), [times]
    def call(*arguments, **options):
        result = original(*arguments, **options)
        left[0] -= 1
        return die() if not left[0] else result
    setattr(place, name, call)

def torn(share):
    original = os.pwrite
    def pwrite(descriptor, data, offset):
        if bytes(data[:10]) != b'{"client":':
            return original(descriptor, data, offset)
        original(descriptor, data[: int(len(data) * share)], offset)
        die()
    os.pwrite = pwrite

POINTS = {
    "before the key": lambda: before(session.MaskingSession, "save_key"),
    "after the key": lambda: after(session.MaskingSession, "save_key"),
    "in the first ledger line": lambda: torn(0.2),
    "in the second ledger line": lambda: torn(0.8),
    "between the lines and the disk": lambda: before(os, "ftruncate") if point else None,
    "between the lines and the head": lambda: after(ledger, "_append"),
    "after the ledger": lambda: after(ledger, "record"),
    "before the first rename": lambda: before(files, "rename_exclusive"),
    "after the first rename": lambda: after(files, "rename_exclusive"),
    "between the proxies": lambda: after(writer.ArtifactWriter, "publish"),
    "before the end": lambda: after(writer.ArtifactWriter, "publish", 2),
}
if point != "between the lines and the disk":
    POINTS[point]()
else:
    original = ledger._append
    def _append(descriptor, size, lines):
        os.ftruncate = die
        original(descriptor, size, lines)
    ledger._append = _append
fedqsn_cli.export_proxy(
    str(root / "model"), root / "{client}", client=["ann", "bob"], round=1, key=root / "key", p1=0.3, p2=0.2,
    ledger=root / "ledger.jsonl", allow_untrainable=True,
)
"""
POINTS = [line.split('"')[1] for line in DYING.splitlines() if line.startswith('    "')]


HEAD = "ledger.jsonl.head"


def run_and_die(script: str, *arguments: str | Path) -> None:
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, timeout=600)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def check_state(root: Path) -> dict[str, str]:
    """Every proxy that is there is whole and in the ledger, and has its key; returns ids by client."""
    releases = {}
    if (root / "ledger.jsonl").exists():
        job = job_key.load(root / "key")
        releases = {release.client: release for release in ledger.read(root / "ledger.jsonl", job)}
    ids = {}
    for client in CLIENTS:
        if not (root / client).exists():
            continue
        manifest = json.loads((root / client / "proxy.json").read_bytes())
        files = {path.name: file_digest(path) for path in (root / client).iterdir()}
        assert files.pop("proxy.json") == releases[client].proxy_sha256
        assert files == manifest["files"]
        ids[client] = manifest["proxy_id"]
    if releases:
        assert all(release.job == job_key.load(root / "key").commitment for release in releases.values())
    return {client: release.proxy_id for client, release in releases.items()} | ids


@pytest.mark.parametrize("point", POINTS)
def test_i6_an_export_killed_at_a_bad_moment_is_completed_by_running_it_again(point: str, folder: Path) -> None:
    make_model(folder / "model", "bert", hidden=33)
    run_and_die(DYING, point, folder)
    promised = check_state(folder)
    lines = (folder / "ledger.jsonl").read_bytes() if (folder / "ledger.jsonl").exists() else b""
    lines = lines[: lines.rfind(b"\n") + 1]  # a torn line does not count
    missing = [client for client in CLIENTS if not (folder / client).exists()]
    for client in missing:
        export_proxy(
            str(folder / "model"),
            folder / client,
            client=client,
            round=1,
            key=folder / "key",
            p1=0.3,
            p2=0.2,
            ledger=folder / "ledger.jsonl",
        )
    ids = check_state(folder)
    assert ids.keys() == set(CLIENTS)
    assert promised.items() <= ids.items()
    after = (folder / "ledger.jsonl").read_bytes()
    assert after.startswith(lines)
    assert len(after.splitlines()) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["ann", "bob", "key", "ledger.jsonl", HEAD, "model"]


def test_i6_the_points_of_death_are_really_met(folder: Path) -> None:
    """Else the test above would test nothing: three of them leave three different states."""
    states = []
    for index, point in enumerate(("before the key", "after the ledger", "between the proxies")):
        root = folder / str(index)
        make_model(root / "model", "bert", hidden=33)
        run_and_die(DYING, point, root)
        states.append((sorted(check_state(root)), sorted(p.name for p in root.iterdir() if not p.name.startswith("."))))
    assert states == [
        ([], ["model"]),
        (["ann", "bob"], ["key", "ledger.jsonl", HEAD, "model"]),
        (["ann", "bob"], ["ann", "key", "ledger.jsonl", HEAD, "model"]),
    ]


# Plays round after round, skipping what is done, as a Makefile would; says when it has begun.
JOB = """
import shutil, sys
from pathlib import Path
from fedqsn_cli import export_proxy, mask, merge
sys.path.insert(0, sys.argv[3])
from support.helpers import noise, send

root, rounds = Path(sys.argv[1]), int(sys.argv[2])
job = {"key": root / "key", "ledger": root / "ledger.jsonl"}
print("going", flush=True)
model = root / "model"
for number in range(1, rounds + 1):
    proxies = [root / f"proxies-{number}" / name for name in ("ann", "bob")]
    for proxy in proxies:
        if not proxy.exists():
            export_proxy(str(model), proxy, client=proxy.name, round=number, p2=0.2, allow_untrainable=True, **job)
    updates = [root / f"update-{number}-{proxy.name}" for proxy in proxies]
    for proxy, update in zip(proxies, updates):
        if not update.exists():  # `send` writes into the folder itself: it gets its name when it is whole
            shutil.rmtree(root / "half", ignore_errors=True)
            send(proxy, root / "half", noise(number))
            (root / "half").rename(update)
    if not (root / f"model-{number}").exists():
        merge(str(model), updates, root / f"model-{number}", **job)
    model = root / f"model-{number}"
print("done", flush=True)
"""
ROUNDS = 3


def start(root: Path) -> subprocess.Popen[bytes]:
    tests = str(Path(__file__).parents[1])
    child = subprocess.Popen(
        [sys.executable, "-c", JOB, root, str(ROUNDS), tests], env=environment(), stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"going\n"
    return child


def finish(root: Path) -> None:
    child = start(root)
    assert child.stdout is not None
    assert child.stdout.readline() == b"done\n"
    child.wait()
    child.stdout.close()


def settled(root: Path) -> dict[str, bytes]:
    """All files; fedqsn.json notes from which path a model was made, and updates hold nothing of interest."""
    files = contents(root)
    assert not [name for name in os.listdir(root) if name.startswith(".")]
    return {name: data for name, data in files.items() if not name.endswith("fedqsn.json")}


@pytest.mark.parametrize("seed", [0])
def test_i6_a_job_killed_again_and_again_ends_byte_for_byte_like_one_that_was_not(seed: int, folder: Path) -> None:
    make_model(folder / "calm/model", "gpt2", dtype="BF16", hidden=96, inner=384, vocabulary=801)
    mask(str(folder / "calm/model"), folder / "calm/server", key=folder / "calm/key", p1=0.3)
    shutil.copytree(folder / "calm", folder / "wild")
    began = time.monotonic()
    finish(folder / "calm")
    length = time.monotonic() - began
    rng = random.Random(seed)
    for _ in range(6):
        child = start(folder / "wild")
        time.sleep(rng.uniform(0, length / 4))
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()
        for number in range(1, ROUNDS + 1):
            for path in (folder / f"wild/proxies-{number}").glob("[!.]*"):
                ids = {release.proxy_sha256 for release in ledger.read(folder / "wild/ledger.jsonl")}
                assert file_digest(path / "proxy.json") in ids
    finish(folder / "wild")
    assert settled(folder / "wild") == settled(folder / "calm")
