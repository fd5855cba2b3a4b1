"""Runs cells: each result is one file that appears when it is complete; what is there is not made again."""

from __future__ import annotations

import fnmatch
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.study.settings import Cell, floor_of
from benchmarks.study.worlds import World, locked, world

Player = Callable[[Cell, World, Path, dict[int, float]], dict[str, Any]]

PACKAGES = ("numpy", "numba", "torch", "transformers", "tokenizers", "peft")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "FEDQSN_THREADS")


def chosen(found: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """Those cells whose names match one of some globs; all without globs."""
    return [cell for cell in found if not patterns or any(fnmatch.fnmatch(cell.name, one) for one in patterns)]


def path_of(cell: Cell, work: Path) -> Path:
    """Where a cell's result is kept."""
    return work / "cells" / cell.file_name


def load(cell: Cell, work: Path) -> dict[str, Any] | None:
    """A cell's result, or None where it is not there."""
    path = path_of(cell, work)
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def done(cell: Cell, work: Path) -> bool:
    """Is there a result? A failure is tried again."""
    found = load(cell, work)
    return found is not None and "error" not in found


def run(found: Sequence[Cell], work: Path, jobs: int, command: Sequence[str], say: Callable[[str], None]) -> int:
    """Make all cells that are not there; returns how many of them failed.

    Args:
        jobs: how many at a time; one runs in this process.
        command: what runs a cell in a process of its own, when its name is put behind it.
    """
    todo = [cell for cell in found if not done(cell, work)]
    say(f"{len(found) - len(todo)} of {len(found)} cells are there already")
    failed = 0
    with ThreadPoolExecutor(jobs) as pool:
        if jobs == 1:
            results = (_timed(cell, lambda cell=cell: execute(cell, work)) for cell in todo)  # type: ignore[misc]
        else:
            waiting = [pool.submit(_timed, cell, lambda cell=cell: _child(cell, work, command)) for cell in todo]  # type: ignore[misc]
            results = (future.result() for future in as_completed(waiting))
        try:
            for number, (cell, seconds) in enumerate(results, 1):
                result = load(cell, work) or {"error": "it left no result"}
                failed += "error" in result
                say(f"[{number}/{len(todo)}] {cell.name}: {result.get('error', 'done')} ({seconds:.0f} s)")
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def _timed(cell: Cell, work: Callable[[], None]) -> tuple[Cell, float]:
    began = time.monotonic()
    work()
    return cell, time.monotonic() - began


def _child(cell: Cell, work: Path, command: Sequence[str]) -> None:
    """One cell in a process of its own, on one core."""
    environment = os.environ | dict.fromkeys(THREADS, "1")
    done = subprocess.run([sys.executable, *command, cell.name], env=environment, capture_output=True, text=True)
    if done.returncode != 0 and load(cell, work) is None:
        _write(path_of(cell, work), {"name": cell.name, "error": f"its process ended with {done.returncode}"})
        log = path_of(cell, work).with_suffix(".log")
        log.write_text(done.stderr)


def execute(cell: Cell, work: Path) -> None:
    """Make one cell and keep its result, or what went wrong; artifacts are deleted. One process a cell."""
    (work / "cells").mkdir(parents=True, exist_ok=True)
    with locked(path_of(cell, work).with_suffix(".lock")):
        if not done(cell, work):
            _make(cell, work)


def _make(cell: Cell, work: Path) -> None:
    began, log = time.monotonic(), path_of(cell, work).with_suffix(".log")
    result: dict[str, Any]
    with tempfile.TemporaryDirectory(prefix=f"cell-{os.getpid()}-", dir=work) as folder:
        try:
            place, floor = world(work, cell.task, cell.seed), floor_losses(cell, work)
            began = time.monotonic()
            result = _measured(cell, place, Path(folder), floor)
            log.unlink(missing_ok=True)
        except Exception as error:  # the other cells go on
            log.write_text(traceback.format_exc())
            result = {"error": f"{type(error).__name__}: {str(error).replace(str(work.resolve()), '.')}"}
    seconds = round(time.monotonic() - began, 1)
    about = {"name": cell.name, "seconds": seconds, "machine": machine(), "versions": versions()}
    _write(path_of(cell, work), about | {"settings": cell.settings} | result)


def floor_losses(cell: Cell, work: Path) -> dict[int, float]:
    """What the public base alone comes to with public examples: measured once for a task and a seed.

    Raises:
        RuntimeError: that could not be measured.
    """
    if cell.method.kind not in {"job", "curve", "lora", "largest"}:
        return {}
    other = floor_of(cell)
    execute(other, work)
    if not done(other, work):
        raise RuntimeError(f"{other.name} failed")
    return {point["n"]: point["loss"] for point in (load(other, work) or {})["curve"]}


def _measured(cell: Cell, place: World, folder: Path, floor: dict[int, float]) -> dict[str, Any]:
    from benchmarks.study import jobs, rivals, trials
    from benchmarks.study.attack import fine_tuned

    if cell.method.kind == "world":
        return place.record
    if cell.method.kind == "floor":
        return fine_tuned(place, place.base, {"public base": None}, cell.sizes)
    players: dict[str, Player] = {
        "job": jobs.play,
        "curve": jobs.curve,
        "local": rivals.local,
        "lora": rivals.fedlpp,
        "offsite": rivals.offsite,
        "largest": trials.largest,
        "replacement": trials.replacement,
        "layers": trials.layers,
        "ending": trials.ending,
        "rounds": trials.rounds,
        "blends": jobs.endings,
        "consolidated": jobs.endings,
    }
    return players[cell.method.kind](cell, place, folder, floor)


def keep(cell: Cell, work: Path, result: dict[str, Any]) -> None:
    """Keep a cell's result that was made elsewhere."""
    (work / "cells").mkdir(parents=True, exist_ok=True)
    _write(path_of(cell, work), result)


def _write(path: Path, result: dict[str, Any]) -> None:
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.rename(path)


def machine() -> dict[str, Any]:
    """What it ran on: no names, no paths."""
    return {"cores": os.cpu_count(), "processor": _processor(), "python": platform.python_version()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions() -> dict[str, str]:
    """Packages that a result depends on; those that are missing are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:
            continue
    return found


def sweep(work: Path) -> None:
    """Delete what killed runs left behind; cells of another run that goes on beside this one stay."""
    for folder in work.glob("cell-*-*"):
        if not Path("/proc", folder.name.split("-")[1]).exists():
            shutil.rmtree(folder, ignore_errors=True)
