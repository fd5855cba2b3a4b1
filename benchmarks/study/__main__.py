"""Run the study: `python -m benchmarks.study`. Interrupt it at any time; the next run goes on where it was."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.study import report, runner
from benchmarks.study.settings import cells


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 when a cell failed."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(arguments)
    work, out = options.work.resolve(), options.out.resolve()
    found = cells(options.seeds, smoke=options.smoke, long=options.long)
    if options.cell is not None:
        for cell in runner.chosen(found, [options.cell]):
            runner.execute(cell, work)
        return 0
    if options.published:
        print(f"{report.adopt(found, work, out)} cells of {options.out / report.RESULTS} are taken over")
    failed = 0
    if not options.report:
        runner.sweep(work)
        command = ["-m", "benchmarks.study", *arguments, "--cell"]
        try:
            failed = runner.run(
                runner.chosen(found, options.only), work, options.jobs, command, lambda line: print(line, flush=True)
            )
        except KeyboardInterrupt:
            print("stopped; the next run goes on from here", file=sys.stderr)
            return 130
    report.write(found, work, out)
    print(f"report: {options.out}")
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/study"), help="where results and models are kept")
    parser.add_argument("--out", type=Path, default=Path("docs/study"), help="where the report goes")
    parser.add_argument("--seeds", type=int, default=3, help="how often everything is repeated")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, one core each")
    parser.add_argument("--only", action="append", default=[], metavar="GLOB", help="cells by name: topics/0/strong")
    parser.add_argument("--long", action="store_true", help="attacks with more sizes, too, at the first seed")
    parser.add_argument("--smoke", action="store_true", help="tiny data and models: try out, measure nothing")
    parser.add_argument("--published", action="store_true", help="take over what results.json holds, run what it lacks")
    parser.add_argument("--report", action="store_true", help="run nothing, write the report again")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    for name in runner.THREADS:
        os.environ.setdefault(name, "1")
    sys.exit(main())
