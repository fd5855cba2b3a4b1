"""All or nothing: kill -9 at any instant leaves the old state or the new, and the next run cleans up."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedqsn_cli.checkpoint import ArtifactWriter, Checkpoint, files

# Writes version after version of the same artifacts until it is killed; says when the first is out.
FOREVER = """
import itertools, json, sys
from pathlib import Path
import numpy as np
from fedqsn_cli.checkpoint import ArtifactWriter, TensorSpec, create_secret, stream, write_file_atomically

folder = Path(sys.argv[1])
specs = [TensorSpec(f"w{i}", "F32", (300, 1000)) for i in range(8)] + [TensorSpec("odd", "U8", (5,))]

def artifact(out, version, force):
    with ArtifactWriter(out, force=force) as writer:
        sink = writer.tensors("model", specs, max_shard_bytes=3_000_000, metadata={"version": str(version)})
        for spec in specs:
            sink.write(spec.name, 0, np.full(spec.nbytes, version % 251, np.uint8))
        sink.close()
        writer.add_bytes("proxy.json", json.dumps({"version": version, "files": writer.digests}).encode())
        writer.publish()

for version in itertools.count(int(sys.argv[2])):
    artifact(folder / "replaced", version, True)
    artifact(folder / f"new-{version}", version, False)
    write_file_atomically(folder / "ledger", str(version).encode() * 10_000)
    create_secret(folder / f"key-{version}", str(version).encode() * 10_000)
    if version == int(sys.argv[2]):
        print("going", flush=True)
"""


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


def start(code: str, folder: Path, version: int) -> subprocess.Popen[bytes]:
    """A writer that has published its first version; leaving its block waits for its end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", code, folder, str(version)], env=environment, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"going\n"
    return child


@pytest.mark.parametrize("seed", range(2))
def test_a_kill_at_any_instant_leaves_the_old_state_or_the_new(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    newest = 0
    for _ in range(8):
        with start(FOREVER, tmp_path, newest + 1) as child:
            time.sleep(rng.uniform(0, 0.12))
            child.send_signal(signal.SIGKILL)
        before, newest = newest, check_state(tmp_path)
        assert newest > before
    for name in ["replaced", *(f"new-{version}" for version in range(newest + 2))]:
        with ArtifactWriter(tmp_path / name, force=True):
            pass  # starting to write is enough to sweep
    assert [name for name in os.listdir(tmp_path) if name.startswith((".replaced", ".new-"))] == []
    check_state(tmp_path)


# Makes the instant between the two renames long enough to be hit.
SLOW_RENAMES = """
import errno, os, time
from fedqsn_cli import linux
def unsupported(*_):
    raise OSError(errno.ENOSYS, "")
rename = os.rename
def slow(source, target):
    rename(source, target)
    time.sleep(0.02)
linux._renameat2, os.rename = unsupported, slow
"""


def test_where_directories_cannot_be_swapped_the_next_run_mends_a_killed_replacement(tmp_path: Path) -> None:
    rng = random.Random(0)
    for version in range(1000, 8000, 1000):
        with start(SLOW_RENAMES + FOREVER, tmp_path, version) as child:
            time.sleep(rng.uniform(0, 0.2))
            child.send_signal(signal.SIGKILL)
        with ArtifactWriter(tmp_path / "replaced", force=True):
            pass
        assert check_artifact(tmp_path / "replaced") >= version
        assert not files.aside_path(tmp_path / "replaced").exists()
