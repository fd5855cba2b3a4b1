"""What was measured: a table to read, JSON to keep."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.measure import Sample
from fedqsn_cli.version import VERSION

PACKAGES = ("numpy", "numba", "torch", "transformers", "bitsandbytes", "safetensors", "huggingface_hub")
FLAT = 0.10  # how much peaks of one command may differ from size to size


@dataclass(frozen=True)
class Row:
    """One figure.

    Args:
        ratio: of medians, ours over the peer's or the peer's over ours as `target` says; None where there is none.
        target: what is to be reached, as text; reached: whether it was.
        open_files: the most that one process had, where that was looked at.
    """

    figure: str
    size: str
    ours: Sample | None
    peer: str = ""
    theirs: Sample | None = None
    ratio: float | None = None
    target: str = ""
    reached: bool | None = None
    note: str = ""
    open_files: int | None = None

    @classmethod
    def of(
        cls,
        figure: str,
        size: str,
        ours: Sample,
        peer: str,
        theirs: Sample,
        ratio: float | None = None,
        most: float | None = None,
        note: str = "",
    ) -> Row:
        """Ours over the peer's: `most` at most."""
        ratio = ours.median / theirs.median if ratio is None else ratio
        target = "" if most is None else f"<= {most:g}x"
        return cls(figure, size, ours, peer, theirs, ratio, target, None if most is None else ratio <= most, note)

    @classmethod
    def faster(cls, figure: str, size: str, ours: Sample, peer: str, theirs: Sample, least: float, note: str) -> Row:
        """How many times as fast as the peer: `least` at least."""
        ratio = theirs.median / ours.median
        return cls(figure, size, ours, peer, theirs, ratio, f">= {least:g}x faster", ratio >= least, note)

    @classmethod
    def within(cls, figure: str, size: str, ours: Sample, most: float, note: str = "") -> Row:
        """Seconds by the clock."""
        return cls(figure, size, ours, target=f"<= {most:g} s", reached=ours.median <= most, note=note)

    @classmethod
    def peak(cls, figure: str, size: str, ours: Sample, most: float) -> Row:
        """Peak memory, in MiB."""
        return cls(figure, size, ours, target=f"<= {most:g} MiB", reached=ours.largest <= most)

    @classmethod
    def load(cls, figure: str, ours: Sample, open_files: int, note: str = "") -> Row:
        """How much of everything something takes."""
        busy = f"{sum(ours.processor):.1f} processor seconds, {open_files} open files"
        return cls(figure, "", ours, note="; ".join(filter(None, [busy, note])), open_files=open_files)

    @classmethod
    def skipped(cls, figure: str, size: str, why: str) -> Row:
        """A figure that could not be measured."""
        return cls(figure, size, None, note=f"skipped: {why}")


def flatness(rows: Sequence[Row]) -> list[Row]:
    """For each command: its largest peak over its smallest, over all sizes."""
    result = []
    for figure in dict.fromkeys(row.figure for row in rows if row.figure.startswith("peak memory") and row.ours):
        samples = [row.ours for row in rows if row.figure == figure and row.ours]
        peaks = [sample.largest for sample in samples]
        sizes = [row.size for row in rows if row.figure == figure and row.ours]
        if len(peaks) > 1:
            ratio = max(peaks) / min(peaks)
            result.append(
                Row(
                    f"{figure}: largest over smallest",
                    " ".join(sizes),
                    None,
                    ratio=ratio,
                    target=f"<= {1 + FLAT:g}x",
                    reached=ratio <= 1 + FLAT,
                )
            )
    return result


def table(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = [
        "| figure | ours | peak MiB | next to | takes | ratio | to reach | |",
        "|---|---:|---:|---|---:|---:|---|---|",
    ]
    for row in rows:
        mark = {True: "yes", False: "**no**", None: ""}[row.reached]
        ours = _seconds(row.ours)
        peak = f"{row.ours.largest:.0f}" if row.ours and row.ours.largest else ""
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
        size = f" ({row.size})" if row.size and row.size not in row.figure else ""
        cells = [row.figure + size, ours, peak, row.peer, _seconds(row.theirs), ratio, row.target, mark]
        lines.append("| " + " | ".join(cells) + " |")
    notes = [f"- {row.figure}{f', {row.size}' if row.size else ''}: {row.note}" for row in rows if row.note]
    return "\n".join([*lines, "", *dict.fromkeys(notes)])


def _seconds(sample: Sample | None) -> str:
    if sample is None:
        return ""
    spread = f" ({min(sample.seconds):.3g}-{max(sample.seconds):.3g})" if len(sample.seconds) > 1 else ""
    return f"{sample.median:.3g} s{spread}"


def document(rows: Sequence[Row], settings: dict[str, Any], work: Path) -> dict[str, Any]:
    """Everything, for a JSON file. Names neither the machine nor its folders."""
    return {
        "format": "fedqsn-benchmark/1",
        "settings": settings,
        "fedqsn": revision(),
        "machine": machine(work),
        "rows": [asdict(row) for row in rows],
    }


def revision() -> str:
    """The commit that was measured, with -dirty where files differ from it; without a repository the version."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or VERSION


def machine(work: Path) -> dict[str, Any]:
    """What the figures were measured on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": _processor(),
        "processors": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
        "disk_free_gb": round(shutil.disk_usage(work).free / 1e9),
        "kernel": platform.release(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "packages": versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
