"""Measure all figures and print them: `python -m benchmarks`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.figures import FIGURES, PARTS, SIZES
from benchmarks.inputs import NoRoom, Place
from benchmarks.measure import Failed
from benchmarks.report import Row, document, flatness, table
from benchmarks.synthetic import SHAPES
from benchmarks.training import KINDS


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; a figure that is not reached is for the reader to judge."""
    options = parser().parse_args(arguments)
    root = str(Path(__file__).resolve().parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, f"{root}/src", os.environ.get("PYTHONPATH")]))
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # compiled once, like installed packages, and not at every start
    os.environ["FEDQSN_ALLOW_UNTRAINABLE"] = "1"  # synthetic models have no tokenizer
    options.work.mkdir(parents=True, exist_ok=True)
    if options.courier is not None:
        from benchmarks import courier

        if options.sites is not None:
            return courier.many_sites(options.work.resolve(), options.sites)
        return courier.main(options.work.resolve(), options.out, options.courier or courier.SIZES)
    place = Place(
        options.work.resolve(),
        options.runs,
        update_format=options.update_format,
        updates=options.updates,
        clients=sorted({1, *options.clients}),
        millions=options.millions,
        load=options.load,
    )
    begin = time.monotonic()
    place.prepare_kernels()
    rows: list[Row] = []
    for name in options.only or FIGURES:
        for size in options.sizes if options.sizes and SIZES[name] != ("",) else SIZES[name]:
            rows += measured(place, name, size)
            write(options.out, rows, place, begin)  # as far as it is: an hour of figures is not lost
            if not options.keep:  # the next figure needs the room
                place.clear(*(path.name for path in place.work.glob(f"job-{size or 'tiny'}-*")))
    rows += flatness(rows)
    write(options.out, rows, place, begin)
    print(table(rows))
    if not options.keep:
        place.clear(*(path.name for path in place.work.iterdir()))
    return 0


def write(out: Path | None, rows: Sequence[Row], place: Place, begin: float) -> None:
    """Write the JSON of these rows."""
    if out is None:
        return
    settings = {
        "runs": place.runs,
        "update_format": place.update_format,
        "clients": list(place.clients),
        "updates": place.updates,
        "kernel_millions": place.millions,
        "load": place.load,
        "seconds": round(time.monotonic() - begin),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document(rows, settings, place.work), indent=1) + "\n")


def measured(place: Place, name: str, size: str) -> list[Row]:
    """The rows of one figure; one row that says why where it cannot be measured."""
    print(f"{time.strftime('%H:%M:%S')} {name} {size}", file=sys.stderr, flush=True)
    rows: list[Row] = []
    try:
        for row in (FIGURES | PARTS)[name](place, size):
            rows.append(row)
            print(table([row]).splitlines()[2], file=sys.stderr, flush=True)
    except (NoRoom, Failed) as error:
        rows.append(Row.skipped(name, size, str(error)))
        print(f"skipped: {error}", file=sys.stderr, flush=True)
    return rows


def parser() -> argparse.ArgumentParser:
    """The options."""
    result = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure fedqsn next to its peers.")
    result.add_argument("--work", type=Path, default=Path("build/bench"), help="folder for models and outputs")
    result.add_argument("--out", type=Path, help="write all figures as JSON")
    result.add_argument("--runs", type=int, default=3, help="runs of each side (default 3)")
    result.add_argument("--only", nargs="+", choices=[*FIGURES, *PARTS], help="measure these figures only")
    result.add_argument("--sizes", nargs="+", choices=[*SHAPES, *KINDS], help="sizes instead of each figure's own")
    result.add_argument("--clients", nargs="+", type=int, default=[1, 10, 100], help="fan-outs (default 1 10 100)")
    result.add_argument("--updates", type=int, default=8, help="updates a merge takes (default 8)")
    result.add_argument("--update-format", choices=("bf16", "fp32"), default="bf16", help="precision of the updates")
    result.add_argument("--millions", type=float, default=64, help="numbers a kernel quantizes, in 2^20 (default 64)")
    result.add_argument("--load", type=float, default=1.0, help="share of the full load, for 'load' (default 1)")
    result.add_argument("--courier", nargs="*", type=float, metavar="GIB", help="measure the courier only")
    result.add_argument("--sites", type=int, help="with --courier: so many sites on this machine at once, instead")
    result.add_argument("--keep", action="store_true", help="keep models and outputs for the next time")
    return result


if __name__ == "__main__":
    sys.exit(main())
