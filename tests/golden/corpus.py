"""The golden corpus: everything that the product makes and prints, recorded once and compared ever after.

    make golden                                      compare; exit code 1 if anything differs
    make golden ARGS="--only outputs merges"         these sections alone
    make golden ARGS="--quick"                       what takes a minute
    make golden ARGS="--write"                       record anew

The sources of another place are compared in tests/, with PYTHONPATH=PLACE/src python -m golden.corpus

What is recorded lies in recorded/: digests and single lines as JSON, one entry a line, and whole texts as they are.
Nothing in it depends on the machine: see `running.settle` and `running.steady`.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

from golden.running import Files, Job, settle

SECTIONS = ("help", "errors", "transcripts", "reports", "merges", "outputs", "training")
MEASURING = {"reports": "", "training": "", "transcripts": "audit merge"}
"""Sections, or jobs of theirs, with numbers whose last digits depend on the processor."""
RECORDED = Path(__file__).parent / "recorded"
MEMORY, ROOM = Path("/dev/shm"), 2**30  # where fsync costs nothing, if there is room for two jobs
LENGTH = 120  # of the paths of working directories: tables are as wide as the paths in them


@dataclass(frozen=True)
class Made:
    """What a job made, and how long it took; or the exception that it ended with."""

    section: str
    files: Files
    seconds: float
    failure: str = ""


def jobs(section: str) -> dict[str, Job]:
    """The jobs of a section, by name."""
    found: dict[str, Job] = import_module(f"golden.{section}").jobs()
    return found


def place() -> Path | None:
    """Where jobs are done: in memory, or wherever temporary files are."""
    roomy = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM
    return MEMORY if roomy else None


def make(section: str, job: str) -> Made:
    """Do one job, in an empty directory."""
    begin, before = time.perf_counter(), Path.cwd()
    files: Files = {}
    failure = ""
    with tempfile.TemporaryDirectory(dir=place(), prefix="fedqsn-golden-") as folder:
        here = os.path.realpath(folder)
        here = os.path.join(here, "x" * max(1, LENGTH - len(here) - 1))
        os.mkdir(here)
        os.chdir(here)
        try:
            files = jobs(section)[job]()
        except Exception:
            failure = f"{section}: the job {job!r} failed\n{traceback.format_exc()}"
        finally:
            os.chdir(before)
    return Made(section, files, time.perf_counter() - begin, failure)


def measures(section: str, job: str) -> bool:
    """Whether a job is done with the same instructions on all processors, for which kernels are compiled anew."""
    return section in MEASURING and (not MEASURING[section] or job in MEASURING[section].split())


def make_all(sections: Sequence[str], processes: int, quick: bool = False) -> list[Made]:
    """Do all jobs of some sections, in processes of their own.

    Args:
        quick: leave out the jobs that measure.
    """
    made: list[Made] = []
    for plainly in (False,) if quick else (False, True):
        todo = [(section, job) for section in sections for job in jobs(section) if measures(section, job) == plainly]
        settle(plainly=plainly)
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            made += pool.map(make, *zip(*todo, strict=True)) if todo else []
    return made


def make_here(section: str) -> list[Made]:
    """Do the jobs of a section that measure nothing, in this process; its environment is another one afterwards."""
    settle()
    return [make(section, job) for job in jobs(section) if not measures(section, job)]


# ------------------------------------------------------------------------------------------------ files


def texts(made: Sequence[Made]) -> dict[str, str]:
    """Every recorded file with its text: the parts that jobs made of one file are put together."""
    merged: Files = {}
    for one in made:
        for name, part in one.files.items():
            assert name.startswith(f"{one.section}/"), name
            known = merged.setdefault(name, {} if isinstance(part, dict) else part)
            if isinstance(known, dict) and isinstance(part, dict):
                assert known.keys().isdisjoint(part), f"{name}: {known.keys() & part.keys()}"
                known |= part
            else:
                assert known is part, f"{name} was made twice"
    return {name: whole if isinstance(whole, str) else as_lines(whole) for name, whole in merged.items()}


def as_lines(records: Mapping[str, str]) -> str:
    """Entries as JSON, one a line."""
    return json.dumps(records, indent=0, ensure_ascii=False) + "\n"


def faults(made: Sequence[Made], before: Mapping[str, str], most: int = 40) -> list[str]:
    """The jobs that failed, and what differs between recorded and made, `most` lines of each file."""
    return [*(one.failure for one in made if one.failure), *differences(before, texts(made), most)]


def recorded(sections: Sequence[str]) -> dict[str, str]:
    """What was recorded of these sections."""
    paths = [path for section in sections for path in sorted((RECORDED / section).rglob("*")) if path.is_file()]
    return {str(path.relative_to(RECORDED)): read(path) for path in paths}


def read(path: Path) -> str:
    """A recorded text, its line ends as they are."""
    with path.open(encoding="utf-8", newline="") as file:
        return file.read()


def write(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Record what was made, and nothing that was not."""
    for name in before.keys() - after.keys():
        (RECORDED / name).unlink()
    for name, text in after.items():
        path = RECORDED / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            file.write(text)


def differences(before: Mapping[str, str], after: Mapping[str, str], most: int = 40) -> Iterator[str]:
    """What differs between recorded and made, file by file, `most` lines of each."""
    for name in sorted(before.keys() | after.keys()):
        old, new = (one.get(name, "").splitlines() for one in (before, after))
        if before.get(name) != after.get(name):
            lines = list(difflib.unified_diff(old, new, f"recorded/{name}", f"made/{name}", n=0, lineterm=""))
            yield from lines[:most] or [f"{name}: its line ends differ"]
            if len(lines) > most:
                yield f"... and {len(lines) - most} lines more"


# ------------------------------------------------------------------------------------------------ the program


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare with what was recorded; or record, unless a job fails. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="golden.corpus", description="Compare all outputs with the golden corpus.")
    parser.add_argument("--check", action="store_true", help="compare; the default")
    parser.add_argument("--write", action="store_true", help="record in place of comparing")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=SECTIONS,
        default=SECTIONS,
        metavar="SECTION",
        help=f"some of {', '.join(SECTIONS)}",
    )
    parser.add_argument("--quick", action="store_true", help="leave out what measures, which takes most of the time")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="jobs at the same time (default 2)")
    parser.add_argument(
        "--lines", type=int, default=40, metavar="N", help="most differing lines of a file (default 40)"
    )
    options = parser.parse_args(arguments)
    made = make_all(options.only, options.processes, options.quick)
    before, after = recorded(options.only), texts(made)
    if options.quick:
        before = {name: text for name, text in before.items() if name in after}
    if options.write and not any(one.failure for one in made):
        write(before, after)
        before = after
    found = faults(made, before, options.lines)
    for line in found:
        print(line)
    for section in options.only:
        print(summary(section, made, after), file=sys.stderr)
    return 1 if found else 0


def summary(section: str, made: Sequence[Made], after: Mapping[str, str]) -> str:
    """How much a section is, and how long it took."""
    mine = [one for one in made if one.section == section]
    files = [text for name, text in after.items() if name.startswith(f"{section}/")]
    lines = sum(len(text.splitlines()) for text in files)
    seconds = sum(one.seconds for one in mine)
    return f"{section:<12} {len(mine):>3} jobs {len(files):>3} files {lines:>6,} lines {seconds:6.1f} s"


if __name__ == "__main__":
    sys.exit(main())
