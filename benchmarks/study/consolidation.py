"""What sending nothing is worth, and what consolidation adds: `python -m benchmarks.study.consolidation`.

For FedAvg, for nothing sent (p1 = 1) and for two jobs in between: the restored model with several blends, and the
consolidated one with several weights of the clients' teacher. Nobody attacks here; `python -m benchmarks.study` does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study import runner
from benchmarks.study.jobs import Job
from benchmarks.study.settings import FEDAVG, NEWS, TOPICS, Cell, Method, Task
from benchmarks.study.worlds import world

WEIGHTS = (0.5, 0.75, 1.0)
BLENDS = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
START = 0.9
STEPS = {"news-lm": (150, 5e-4, 32), "topics": (100, 5e-5, 32)}  # steps, learning rate, examples a batch


def _hiding(name: str, title: str, p1: float) -> Method:
    return Method(name, title, p1=p1, p2=0.1, fill="base", schedule="sticky", train="all")


METHODS = (
    FEDAVG,
    _hiding("nothing-sent", "nothing sent (p1 = 1)", 1.0),
    _hiding("train-all-0.9", "train all, p1 = 0.9", 0.9),
    _hiding("train-all-0.5", "train all, p1 = 0.5", 0.5),
)


def measure(task: Task, seed: int, method: Method, work: Path) -> dict[str, Any]:
    """One job: scores on A and B of every ending."""
    place, cell = world(work, task, seed), Cell(task, seed, method)
    with tempfile.TemporaryDirectory(prefix=f"cell-{os.getpid()}-", dir=work) as folder:
        job = Job(cell, place, Path(folder), {})
        server = job.mask()
        for number in range(1, task.rounds + 1):
            job.export(server, number)
            server = job.merge(server, number)
        ends = list(_endings(job, server))
    record = {"task": task.name, "seed": seed, "method": method.name, "title": method.title}
    record |= {key: place.record[key] for key in ("base", "owner")}
    return record | {
        "never_sent": job.never_sent,
        "base": place.record["base"],
        "owner": place.record["owner"],
        "ends": ends,
    }


def _endings(job: Job, server: Path) -> Iterator[dict[str, Any]]:
    for blend in BLENDS if job.method.hides else (1.0,):
        final, _ = job.restore(server, blend)
        yield {"blend": blend, "weight": None, **job.place.scores(final)}
        shutil.rmtree(final)
    for weight in WEIGHTS:
        final = consolidated(job, server, weight)
        yield {"blend": START, "weight": weight, **job.place.scores(final)}
        shutil.rmtree(final)


def consolidated(job: Job, server: Path, weight: float) -> Path:
    """The consolidated model; a language model writes its transfer texts, a classifier takes the development data."""
    from fedqsn_cli import consolidate

    task, place, out = job.place.task, job.place, job.folder / f"consolidated-{weight}"
    steps, lr, batch = STEPS[task.name]
    data: dict[str, Any] = {"own_data": place.data("owner")}
    if task.name == TOPICS.name:
        data["transfer_data"] = place.data("dev")
    else:
        data |= {"written_examples": 2000, "written_length": 28}
    if job.method.train == "all":
        data["public_base"] = str(place.base)
    consolidate(
        str(place.owner),
        str(server),
        out,
        key=job.key,
        blend=START if job.method.hides else 1.0,
        transfer_weight=weight,
        steps=steps,
        lr=lr,
        batch_size=batch,
        max_length=task.max_length,
        device="cpu",
        seed=job.cell.seed,
        **data,
    )
    return out


def shares(found: dict[str, Any], fedavg: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(ending, share of the owner's gain on A that is left, share of FedAvg's gain on B), by losses."""
    base, owner, end = found["base"], found["owner"], fedavg["ends"][0]
    rows = []
    for one in found["ends"]:
        name = f"blend {one['blend']:g}" if one["weight"] is None else f"consolidated, w = {one['weight']:g}"
        left = (base["a"]["loss"] - one["a"]["loss"]) / (base["a"]["loss"] - owner["a"]["loss"])
        gain = (owner["b"]["loss"] - one["b"]["loss"]) / (owner["b"]["loss"] - end["b"]["loss"])
        rows.append((name, left, gain))
    return rows


def table(results: Sequence[dict[str, Any]], task: str) -> str:
    """Medians over seeds, as Markdown."""
    own = [one for one in results if one["task"] == task]
    fedavg = {one["seed"]: one for one in own if one["method"] == FEDAVG.name}
    lines = ["| job | ending | A left | gain on B | accuracy A | accuracy B |", "|---|---|---:|---:|---:|---:|"]
    for method in METHODS:
        runs = [one for one in own if one["method"] == method.name]
        rows = [shares(one, fedavg[one["seed"]]) for one in runs]
        for number in range(len(rows[0]) if rows else 0):
            ends = [one["ends"][number] for one in runs]
            accuracy = [_percent([end[part]["accuracy"] for end in ends]) for part in ("a", "b")]
            left, gain = (statistics.median(row[number][part] for row in rows) for part in (1, 2))
            name = rows[0][number][0]
            lines.append(f"| {method.title} | {name} | {left:.2f} | {gain:.2f} | {accuracy[0]} | {accuracy[1]} |")
    return "\n".join(lines)


def _percent(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{100 * statistics.median(known):.1f} %" if known else "–"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, print the tables, keep all figures in one file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.consolidation", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/study"))
    parser.add_argument("--out", type=Path, default=Path("docs/study/consolidation.json"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--task", action="append", choices=[NEWS.name, TOPICS.name])
    options = parser.parse_args(arguments)
    work = options.work.resolve()
    document = json.loads(options.out.read_text()) if options.out.is_file() else {"results": []}
    results: list[dict[str, Any]] = document["results"]
    for task in (NEWS, TOPICS):
        for seed in range(options.seeds) if task.name in (options.task or [NEWS.name, TOPICS.name]) else ():
            for method in METHODS:
                known = {(one["task"], one["seed"], one["method"]) for one in results}
                if (task.name, seed, method.name) in known:
                    continue
                results.append(measure(task, seed, method, work))
                about = {"machine": runner.machine(), "versions": runner.versions(), "results": results}
                options.out.write_text(json.dumps(about, indent=1) + "\n")
                print(f"{task.name}/{seed}/{method.name}: done", file=sys.stderr, flush=True)
    for task in (NEWS, TOPICS):
        print(f"\n{task.name}\n\n{table(results, task.name)}")
    return 0


if __name__ == "__main__":
    for name in runner.THREADS:
        os.environ.setdefault(name, "2")
    sys.exit(main())
