"""I6, all or nothing, for the commands: kill -9 at any instant leaves whole artifacts, and running again ends the work.

The writer's own tests kill it at every instant; here the key, the ledger and the proxies must agree afterwards.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

from fedqsn_cli import export_proxy, mask, merge
from fedqsn_cli.artifacts import ledger
from fedqsn_cli.artifacts.manifests import file_digest
from fedqsn_cli.checkpoint import files, writer
from fedqsn_cli.export import session
from fedqsn_cli.masks import job_key
from support.forks import fork
from support.helpers import contents, make_model, noise, send

CLIENTS = ("ann", "bob")

HEAD = "ledger.jsonl.head"


# ------------------------------------------------------------------------------------------------ points of death


def die(*_: object, **__: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def before(place: Any, name: str) -> None:
    """Die in place of a function."""
    setattr(place, name, die)


def after(place: Any, name: str, times: int = 1) -> None:
    """Die when a function has been called so many times."""
    original, calls = getattr(place, name), itertools.count(1)

    def call(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        return die() if next(calls) == times else result

    setattr(place, name, call)


def torn(share: float) -> None:
    """Die when so much of a line of the ledger is written."""
    original = os.pwrite

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        if bytes(data[:10]) != b'{"client":':
            return original(descriptor, data, offset)
        original(descriptor, data[: int(len(data) * share)], offset)
        return die()

    os.pwrite = pwrite


def unsynced() -> None:
    """Die when the lines are written, and before the disk has them."""
    original = ledger._append

    def append(*arguments: Any) -> None:
        before(os, "ftruncate")
        original(*arguments)

    ledger._append = append


POINTS: dict[str, Callable[[], None]] = {  # called in a copy of this process
    "before the key": lambda: before(session.MaskingSession, "save_key"),
    "after the key": lambda: after(session.MaskingSession, "save_key"),
    "in the first ledger line": lambda: torn(0.2),
    "in the second ledger line": lambda: torn(0.8),
    "between the lines and the disk": unsynced,
    "between the lines and the head": lambda: after(ledger, "_append"),
    "after the ledger": lambda: after(ledger, "record"),
    "before the first rename": lambda: before(files, "rename_exclusive"),
    "after the first rename": lambda: after(files, "rename_exclusive"),
    "between the proxies": lambda: after(writer.ArtifactWriter, "publish"),
    "before the end": lambda: after(writer.ArtifactWriter, "publish", 2),
}


def export_and_die(point: str, root: Path) -> None:
    """Export two proxies in a process that dies at a point."""

    def work() -> None:
        POINTS[point]()
        export(root, root / "{client}", CLIENTS)

    assert fork(work).wait() == -signal.SIGKILL


def export(root: Path, out: Path, clients: Sequence[str]) -> None:
    given: dict[str, Any] = {"key": root / "key", "ledger": root / "ledger.jsonl", "p1": 0.3, "p2": 0.2}
    export_proxy(str(root / "model"), out, client=clients, round=1, **given)


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
    export_and_die(point, folder)
    promised = check_state(folder)
    lines = (folder / "ledger.jsonl").read_bytes() if (folder / "ledger.jsonl").exists() else b""
    lines = lines[: lines.rfind(b"\n") + 1]  # a torn line does not count
    missing = [client for client in CLIENTS if not (folder / client).exists()]
    for client in missing:
        export(folder, folder / client, [client])
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
        export_and_die(point, root)
        states.append((sorted(check_state(root)), sorted(p.name for p in root.iterdir() if not p.name.startswith("."))))
    assert states == [
        ([], ["model"]),
        (["ann", "bob"], ["key", "ledger.jsonl", HEAD, "model"]),
        (["ann", "bob"], ["ann", "key", "ledger.jsonl", HEAD, "model"]),
    ]


# ------------------------------------------------------------------------------------------------ any instant

ROUNDS = 3


def play(root: Path) -> None:
    """Play round after round, skipping what is done, as a Makefile would."""
    job = {"key": root / "key", "ledger": root / "ledger.jsonl"}
    model = root / "model"
    for number in range(1, ROUNDS + 1):
        proxies = [root / f"proxies-{number}" / name for name in CLIENTS]
        for proxy in proxies:
            if not proxy.exists():
                export_proxy(str(model), proxy, client=proxy.name, round=number, p2=0.2, **job)
        updates = [root / f"update-{number}-{proxy.name}" for proxy in proxies]
        for proxy, update in zip(proxies, updates, strict=True):
            if not update.exists():  # `send` writes into the folder itself: it gets its name when it is whole
                shutil.rmtree(root / "half", ignore_errors=True)
                send(proxy, root / "half", noise(number))
                (root / "half").rename(update)
        if not (root / f"model-{number}").exists():
            merge(str(model), updates, root / f"model-{number}", **job)
        model = root / f"model-{number}"


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
    assert fork(lambda: play(folder / "calm")).wait() == 0
    length = time.monotonic() - began
    rng = random.Random(seed)
    for _ in range(6):
        child = fork(lambda: play(folder / "wild"))
        time.sleep(rng.uniform(0, length / 4))
        child.kill()
        child.wait()
        for number in range(1, ROUNDS + 1):
            for path in (folder / f"wild/proxies-{number}").glob("[!.]*"):
                ids = {release.proxy_sha256 for release in ledger.read(folder / "wild/ledger.jsonl")}
                assert file_digest(path / "proxy.json") in ids
    assert fork(lambda: play(folder / "wild")).wait() == 0
    assert settled(folder / "wild") == settled(folder / "calm")
