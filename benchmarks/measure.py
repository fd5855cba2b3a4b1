"""One process at a time, measured from outside: seconds, processor seconds, peak resident memory.

This process imports nothing large: on Linux a child's peak counts from that of the process which started it.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

LOOK = 0.02  # seconds between two looks at open files


class Failed(Exception):
    """A process that was to be measured failed; the text is the end of what it said."""


@dataclass
class Sample:
    """Runs of one thing. Times in seconds, peak in MiB."""

    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    peak: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def largest(self) -> float:
        """Peak resident memory of the hungriest run, MiB."""
        return max(self.peak)

    def add(self, seconds: float, processor: float, peak: float) -> None:
        self.seconds.append(seconds)
        self.processor.append(processor)
        self.peak.append(peak)


@dataclass(frozen=True)
class Contender:
    """One side of a comparison.

    Args:
        command: what is measured.
        inputs: files and folders to drop from the page cache before each run.
        before: makes the place ready, unmeasured. after: cleans up, unmeasured.
        environment: on top of this process's own.
    """

    command: Sequence[str]
    inputs: Sequence[Path] = ()
    before: Callable[[], object] = lambda: None
    after: Callable[[], object] = lambda: None
    environment: Mapping[str, str] = field(default_factory=dict)


def compare(contenders: Mapping[str, Contender], runs: int) -> dict[str, Sample]:
    """Run all contenders in turn (A B C A B C ...), so that a machine that changes its pace is fair to each."""
    samples = {name: Sample() for name in contenders}
    for _ in range(runs):
        for name, contender in contenders.items():
            contender.before()
            chill(contender.inputs)
            try:
                samples[name].add(*run(contender.command, contender.environment))
            finally:
                contender.after()
    return samples


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[float, float, float]:
    """Run a command to its end.

    Returns:
        Wall seconds from start to exit, processor seconds, and peak resident memory in MiB, by the kernel's account.

    Raises:
        Failed: it could not be started, or its exit code was not 0.
    """
    with tempfile.TemporaryFile() as output:
        begin = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            said = output.read().decode(errors="replace").strip().splitlines()[-12:]
            raise Failed(f"exit code {process.returncode}: {' '.join(command)}\n" + "\n".join(said))
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / unit


def watch(commands: Sequence[Sequence[str]]) -> tuple[Sample, int]:
    """Run commands at the same time, to the end of all.

    Returns:
        Wall seconds until the last has ended, processor seconds of all, and the peak of the hungriest in MiB; and the
        most files that one of them was seen to have open, by looks every 20 ms.

    Raises:
        Failed: one could not be started, or its exit code was not 0.
    """
    begin, files = time.perf_counter(), 0
    with ThreadPoolExecutor(len(commands)) as pool:
        running = [pool.submit(run, command) for command in commands]
        while not all(each.done() for each in running):
            files = max(files, *map(_open_files, _children()), 0)
            time.sleep(LOOK)
        ended = [each.result() for each in running]
    sample = Sample()
    sample.add(time.perf_counter() - begin, sum(each[1] for each in ended), max(each[2] for each in ended))
    return sample, files


def _children() -> list[str]:
    """Processes that this one has started."""
    return [child for task in Path("/proc/self/task").glob("*/children") for child in task.read_text().split()]


def _open_files(process: str) -> int:
    """How many files a process has open; 0 if it has ended, or is still a copy of this one."""
    found = Path("/proc") / process
    try:
        started = (found / "cmdline").read_bytes() != Path("/proc/self/cmdline").read_bytes()
        return len(os.listdir(found / "fd")) if started else 0
    except OSError:
        return 0


def said_by(command: Sequence[str]) -> str:
    """What a command prints. Raises Failed."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise Failed(f"exit code {result.returncode}: {' '.join(command)}\n{result.stderr[-2000:]}")
    return result.stdout


def step_seconds(log: Path, began: float) -> tuple[float, float]:
    """Median seconds of a step after the first, and seconds from `began` to the end of the first."""
    seconds = [json.loads(line)["seconds"] for line in log.read_text().splitlines()]
    later = statistics.median(after - before for before, after in itertools.pairwise(seconds))
    written = log.stat().st_mtime  # when the last step ended
    return later, written - seconds[-1] + seconds[0] - began


def chill(paths: Iterable[Path]) -> None:
    """Write files back and drop them from the page cache: inputs come from the disk, programs stay warm."""
    for path in paths:
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        for file in files:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def total_bytes(folder: Path) -> int:
    """Bytes of all files below a folder, or of one file."""
    files = folder.rglob("*") if folder.is_dir() else [folder]
    return sum(file.stat().st_size for file in files if file.is_file())
