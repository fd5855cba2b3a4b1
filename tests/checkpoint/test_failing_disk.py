"""Full and broken disks, kills by the caller, and memory: what the writer does when something is short."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from safetensors.numpy import load_file

from fedqsn_cli.checkpoint import ArtifactWriter, Checkpoint, TensorSink, TensorSpec, stream
from support import disks
from support.checkpoints import BYTES, ENVIRONMENT, make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disks.small_disk(tmp_path, "24m") as disk:
        yield disk


def write_all(sink: TensorSink, spec: TensorSpec) -> None:
    piece = bytes(1 << 20)
    for start in range(0, spec.nbytes, len(piece)):
        sink.write(spec.name, start, piece[: spec.nbytes - start])
    sink.close()


BIG = TensorSpec("w", "U8", (40, 1 << 20))


@pytest.mark.parametrize("limit", [None, 8 << 20])
def test_a_disk_too_small_is_noticed_before_the_first_byte(limit: int | None, small_disk: Path) -> None:
    specs = [TensorSpec(f"w{i}", "U8", (4 << 20,)) for i in range(10)]
    with pytest.raises(OSError) as caught, ArtifactWriter(small_disk / "out", force=False) as writer:
        writer.tensors("model", specs, max_shard_bytes=limit, metadata={})
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(small_disk) == []
    assert shutil.disk_usage(small_disk).used == 0


def test_a_disk_that_fills_up_stops_the_caller_and_leaves_the_old_artifact(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "reserve", lambda *_: None)  # as on a file system that cannot reserve
    out = make(small_disk / "out")
    with pytest.raises(OSError) as caught, ArtifactWriter(out, force=True) as writer:
        write_all(writer.tensors("model", [BIG], max_shard_bytes=None, metadata={}), BIG)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(small_disk) == ["out"]
    assert load_file(out / "model.safetensors")["a"].tobytes() == BYTES["a"]


def test_a_small_file_on_a_full_disk_leaves_nothing(small_disk: Path) -> None:
    with pytest.raises(OSError) as caught, ArtifactWriter(small_disk / "out", force=False) as writer:
        writer.add_bytes("big.json", bytes(30 << 20))
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(small_disk) == []


LIMITED = """
import resource, signal, sys
from pathlib import Path
from fedqsn_cli.checkpoint import ArtifactWriter, TensorSpec, stream
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10 << 20, 10 << 20))
if sys.argv[2] == "unreserved":
    stream.reserve = lambda *_: None
try:
    with ArtifactWriter(Path(sys.argv[1]), force=False) as writer:
        sink = writer.tensors("model", [TensorSpec("w", "U8", (64, 1 << 20))], max_shard_bytes=None, metadata={})
        for i in range(64):
            sink.write("w", i << 20, bytes(1 << 20))
        sink.close()
        writer.publish()
except OSError as error:
    print(error.errno)
"""


@pytest.mark.parametrize("how", ["reserved", "unreserved"])
def test_a_file_over_the_allowed_size_leaves_nothing(how: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path / "out", how],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stdout.strip() == str(errno.EFBIG), done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", ["pwrite", "fsync", "ftruncate"])
def test_a_failing_disk_stops_writing_with_its_own_error(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> NoReturn:
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(os, call, broken)
    with pytest.raises(OSError, match="broken disk"), ArtifactWriter(tmp_path / "out", force=False) as writer:
        write_all(writer.tensors("model", [BIG], max_shard_bytes=None, metadata={}), BIG)
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_direct_writes_is_written_through_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite

    def refuse_direct(descriptor: int, data: memoryview, offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", refuse_direct)
    with ArtifactWriter(tmp_path / "out", force=False) as writer:
        write_all(writer.tensors("model", [BIG], max_shard_bytes=None, metadata={}), BIG)
        digest = writer.digests["model.safetensors"]
        out = writer.publish()
    assert digest == hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def test_an_error_in_the_callers_block_deletes_everything(tmp_path: Path) -> None:
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), ArtifactWriter(tmp_path / "out", force=False) as writer:
            sink = writer.tensors("model", [BIG], max_shard_bytes=None, metadata={})
            for i in range(30):
                sink.write("w", i << 20, bytes(1 << 20))
            raise error
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert threading.active_count() == threads


MEMORY = """
import sys
from pathlib import Path
import numpy as np
from fedqsn_cli.checkpoint import ArtifactWriter, Checkpoint, TensorSpec
size, count = 8 << 20, int(sys.argv[2])
buffer = np.ones(size, np.uint8)
with ArtifactWriter(Path(sys.argv[1]), force=False) as writer:
    specs = [TensorSpec(f"w{i}", "U8", (size,)) for i in range(count)]
    sink = writer.tensors("model", specs, max_shard_bytes=64 << 20, metadata={})
    for spec in specs:
        sink.write(spec.name, 0, buffer)
    sink.close()
    writer.publish()
with Checkpoint.open(sys.argv[1]) as checkpoint:
    for name in checkpoint.entries:
        checkpoint.read_into(name, 0, buffer)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    peaks = []
    for count in (16, 64):  # 128 and 512 MiB
        out = tmp_path / "out"
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, out, str(count)],
            env=ENVIRONMENT,
            capture_output=True,
            check=True,
            timeout=600,
        )
        peaks.append(int(done.stdout) / 1024)
        shutil.rmtree(out)
    assert peaks[1] < peaks[0] + 8
    assert peaks[1] < 128


def test_more_shards_than_descriptors_can_be_written(tmp_path: Path) -> None:
    specs = [TensorSpec(f"w{i}", "U8", (64,)) for i in range(300)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 128), hard))
    try:
        with ArtifactWriter(tmp_path / "out", force=False) as writer:
            sink = writer.tensors("model", specs, max_shard_bytes=64, metadata={})
            for spec in specs:
                sink.write(spec.name, 0, bytes(64))
            sink.close()
            out = writer.publish()
        assert len(Checkpoint.open(out).entries) == 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
