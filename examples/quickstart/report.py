"""Print the results of federated jobs, round by round.

    python report.py work/fedqsn [work/fedavg]

Reads only the files of a job: their sizes, the output of `fedqsn evaluate --json` for all models and proxies in
scores.json, and that of `fedqsn inspect --json` for each one that hides something, in *.inspect.json next to it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean

HEADINGS = ("round", "global model", "server model", "proxies", "MB down", "MB up", "never sent", "a proxy lacks")
NOTES = """\
global model    the owner's complete model after the round, on the test articles (round 0: before the job)
server model    the same without the neurons that the job hides from everyone
restore         the owner's first model and the last server model, blended by the owner's development articles
proxies         what the clients were sent in the round, before they trained; mean over clients
MB down, up     proxies and updates of all clients together
never sent      share of all parameters that no client ever gets
a proxy lacks   share of all parameters that a client did not get in the round; mean over clients"""


def accuracies(job: Path) -> dict[Path, float]:
    """Share of test articles that each model classifies correctly, by its path inside of the job."""
    scores = json.loads((job / "scores.json").read_text())
    return {Path(name).relative_to(job): float(score["accuracy"]) for name, score in scores.items()}


def hidden(model: Path) -> float:
    """Share of all parameters that a server model or proxy does not hold."""
    return float(json.loads(model.with_name(f"{model.name}.inspect.json").read_text())["facts"]["hidden"])


def megabytes(folders: Iterable[Path]) -> float:
    return sum(file.stat().st_size for folder in folders for file in folder.iterdir()) / 1e6


def row(folder: Path, job: Path, found: Mapping[Path, float]) -> list[str]:
    """The row of one round; round 0 has no proxies and no updates."""

    def accuracy(model: Path) -> float:
        return found[model.relative_to(job)]

    proxies, updates = ([path for path in folder.glob(f"{kind}/*") if path.is_dir()] for kind in ("proxies", "updates"))
    cells = [folder.name.removeprefix("r"), percent(accuracy(folder / "global")), percent(accuracy(folder / "server"))]
    if proxies:
        cells += [percent(mean(map(accuracy, proxies))), f"{megabytes(proxies):.1f}", f"{megabytes(updates):.1f}"]
    else:
        cells += ["-"] * 3
    lacking = percent(mean(map(hidden, proxies))) if proxies else "-"
    return [*cells, percent(hidden(folder / "server")), lacking]


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns under their headings, aligned to the right."""
    widths = [max(len(line[column]) for line in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in rows)


def ending(found: Mapping[Path, float], last: Path) -> str:
    """What the job was worth, in a line."""
    before, after = percent(found[Path("r0/global")]), percent(found[Path("final")])
    never = percent(hidden(last / "server"))
    return f"the owner's model: {before} before, {after} after the restore; never sent: {never}"


def report(jobs: Iterable[Path]) -> str:
    """The tables of all jobs, and what their columns mean."""
    parts = []
    for job in jobs:
        rounds = sorted(job.glob("r*"), key=lambda folder: int(folder.name.removeprefix("r")))
        found = accuracies(job)
        rows = [row(folder, job, found) for folder in rounds]
        parts.append(f"{job.name}\n\n{table([HEADINGS, *rows])}\n\n{ending(found, rounds[-1])}")
    return "\n\n\n".join([*parts, NOTES])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Print the results of federated jobs, round by round.")
    parser.add_argument("jobs", type=Path, nargs="+", metavar="JOB", help="folder of a job, such as work/fedqsn")
    print(f"\n{report(parser.parse_args(arguments).jobs)}")


if __name__ == "__main__":
    main()
