"""Print what each share of hidden neurons costs and brings, and write it as a page.

    python report.py work --global my-model

Reads mask.json and audit.json of each job, and what `fedqsn evaluate --json` says on both kinds of development data.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

HEADINGS = (
    "p1",
    "never sent",
    "attacker",
    "own, restored",
    "own, consolidated",
    "clients', restored",
    "clients', consolidated",
)
NOTES = """\
never sent   share of all parameters that no client ever gets
attacker     share of your own skill, in loss, that the best attack on the first round's proxies gets without examples:
             0 as the public model, 1 as your model
own          the final model on examples of your own skill
clients'     the final model on examples like those of the clients
Take the row with the least in the column "attacker" that is good enough in both skills. One that is worse at the
clients' than your model is no reason for a job."""
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>What to send</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
td, th {{ padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd }}
</style>
<h1>What to send</h1>
<table><tr>{headings}</tr>
{rows}
</table>
<pre>{notes}</pre>
</html>
"""


def share(value: float | None) -> str:
    """A share of one, in percent."""
    return "-" if value is None else f"{100 * value:.1f} %"


def score(found: dict[str, Any]) -> str:
    """What an evaluation says best: accuracy, else perplexity, else the loss."""
    if found["accuracy"] is not None:
        return share(found["accuracy"])
    return f"{found['perplexity']:.1f} ppl" if found["perplexity"] is not None else f"{found['loss']:.4g}"


def rows(work: Path, whole: str) -> list[tuple[str, ...]]:
    """The owner's model as it is, then a row for each job."""
    own, other = (json.loads((work / f"{skill}.json").read_text()) for skill in ("own", "other"))
    lines: list[tuple[str, ...]] = [("your model", "-", "-", score(own[whole]), "-", score(other[whole]), "-")]
    for job in sorted(work.glob("p1-*"), key=lambda folder: float(folder.name.removeprefix("p1-"))):
        function = json.loads((job / "audit.json").read_text())["function"]
        hidden = json.loads((job / "mask.json").read_text())["hidden"]
        ends = [str(job / end) for end in ("restored", "consolidated")]
        scores = [score(skill[end]) for skill in (own, other) for end in ends]
        lines.append((job.name.removeprefix("p1-"), share(hidden), share(function and function["rho"]), *scores))
    return lines


def table(lines: Sequence[Sequence[str]]) -> str:
    """Columns under their headings, aligned to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def page(lines: Sequence[Sequence[str]]) -> str:
    """The same table as HTML."""
    headings = "".join(f"<th>{escape(name)}</th>" for name in HEADINGS)
    body = ("".join(f"<td>{escape(cell)}</td>" for cell in line) for line in lines)
    return PAGE.format(headings=headings, rows="\n".join(f"<tr>{cells}</tr>" for cells in body), notes=escape(NOTES))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Print what each share of hidden neurons costs and brings.")
    parser.add_argument("work", type=Path, metavar="WORK", help="folder of run.sh")
    parser.add_argument("--global", dest="whole", required=True, help="your model, as it was given to run.sh")
    options = parser.parse_args(arguments)
    lines = rows(options.work, options.whole)
    (options.work / "frontier.html").write_text(page(lines), encoding="utf-8")
    print(f"\n{table([HEADINGS, *lines])}\n\n{NOTES}")


if __name__ == "__main__":
    main()
