"""All or nothing: kill -9 at any instant leaves the old state or the new, and the next run cleans up."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedqsn_cli import linux
from fedqsn_cli.checkpoint import ArtifactWriter, Checkpoint, TensorSpec, create_secret, files, write_file_atomically
from support.forks import fork

SPECS = [TensorSpec(f"w{i}", "F32", (300, 1000)) for i in range(8)] + [TensorSpec("odd", "U8", (5,))]


def write_forever(folder: Path, first: int, going: int) -> None:
    """Write version after version of the same artifacts; says through a descriptor when the first is out."""
    for version in itertools.count(first):
        write_artifact(folder / "replaced", version, force=True)
        write_artifact(folder / f"new-{version}", version, force=False)
        write_file_atomically(folder / "ledger", str(version).encode() * 10_000)
        create_secret(folder / f"key-{version}", str(version).encode() * 10_000)
        if version == first:
            os.write(going, b"!")


def write_artifact(out: Path, version: int, *, force: bool) -> None:
    with ArtifactWriter(out, force=force) as writer:
        sink = writer.tensors("model", SPECS, max_shard_bytes=3_000_000, metadata={"version": str(version)})
        for spec in SPECS:
            sink.write(spec.name, 0, np.full(spec.nbytes, version % 251, np.uint8))
        sink.close()
        writer.add_bytes("proxy.json", json.dumps({"version": version, "files": writer.digests}).encode())
        writer.publish()


def check_artifact(path: Path) -> int:
    """Every byte of an artifact that has its name is there; returns its version."""
    manifest = json.loads((path / "proxy.json").read_bytes())
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}
    del files["proxy.json"]
    assert files == manifest["files"]
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.metadata == {"version": str(manifest["version"])}
        assert len(checkpoint.entries) == 9
    return int(manifest["version"])


def check_state(folder: Path) -> int:
    """Everything visible is complete; returns the newest version."""
    versions = []
    for path in folder.iterdir():
        if path.name.startswith("."):
            assert ".fedqsn-" in path.name and not path.name.startswith(".key-")
        elif path.name == "replaced" or path.name.startswith("new-"):
            versions.append(check_artifact(path))
        else:
            text = path.read_text()
            version = len(text) // 10_000
            assert text == text[:version] * 10_000
    return max(versions, default=0)


def write_and_be_killed(folder: Path, first: int, seconds: float, prepare: Callable[[], object] = int) -> None:
    """Kill a process so many seconds after it has published its first version.

    Args:
        prepare: called in that process.
    """
    reading, writing = os.pipe()
    child = fork(lambda: (prepare(), write_forever(folder, first, writing)))
    os.close(writing)
    with open(reading, "rb") as going:
        assert going.read(1) == b"!"
        time.sleep(seconds)
        child.kill()
        assert child.wait() == -signal.SIGKILL


@pytest.mark.parametrize("seed", range(2))
def test_a_kill_at_any_instant_leaves_the_old_state_or_the_new(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    newest = 0
    for _ in range(8):
        write_and_be_killed(tmp_path, newest + 1, rng.uniform(0, 0.12))
        before, newest = newest, check_state(tmp_path)
        assert newest > before
    for name in ["replaced", *(f"new-{version}" for version in range(newest + 2))]:
        with ArtifactWriter(tmp_path / name, force=True):
            pass  # starting to write is enough to sweep
    assert [name for name in os.listdir(tmp_path) if name.startswith((".replaced", ".new-"))] == []
    check_state(tmp_path)


def rename_slowly() -> None:
    """Make the instant between the two renames of a replacement long enough to be hit."""

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOSYS, "")

    def slow(source: Path, target: Path, rename: Callable[[Path, Path], None] = os.rename) -> None:
        rename(source, target)
        time.sleep(0.02)

    linux._renameat2, os.rename = unsupported, slow


def test_where_directories_cannot_be_swapped_the_next_run_mends_a_killed_replacement(tmp_path: Path) -> None:
    rng = random.Random(0)
    for version in range(1000, 8000, 1000):
        write_and_be_killed(tmp_path, version, rng.uniform(0, 0.2), rename_slowly)
        with ArtifactWriter(tmp_path / "replaced", force=True):
            pass
        assert check_artifact(tmp_path / "replaced") >= version
        assert not files.aside_path(tmp_path / "replaced").exists()
