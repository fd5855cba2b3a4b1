"""Print what the quickstart's job was worth.

    python report.py work

Reads the output of `fedqsn evaluate --json` in scores.json, that of `fedqsn inspect --json` for the server model in
fedqsn/hidden.json, and the sizes of proxies and updates.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

NOTES = """\
Accuracy is on test articles that nobody trained on. The attacker has what all clients were sent in the first round,
before they taught the model anything, in full precision, and tries both holes as they are and the public base in them;
`make audit` attacks harder, with examples. Never sent is the share of all parameters that no client ever gets."""


def accuracies(work: Path) -> dict[str, float]:
    """Share of test articles that each model classifies correctly, by its path inside of `work`."""
    scores = json.loads((work / "scores.json").read_text())
    return {str(Path(name).relative_to(work)): float(score["accuracy"]) for name, score in scores.items()}


def megabytes(folders: Iterable[Path]) -> float:
    """Size of all files of some folders."""
    return sum(file.stat().st_size for folder in folders for file in folder.iterdir()) / 1e6


def rows(work: Path, found: Mapping[str, float]) -> list[tuple[str, str]]:
    """What the table says; FedAvg only where it was played."""
    job = work / "fedqsn"
    never_sent = float(json.loads((job / "hidden.json").read_text())["facts"]["hidden"])
    attacker = max(found["fedqsn/r0/server"], found["fedqsn/r0/filled"])
    sizes = [megabytes(job.glob(f"r1/{kind}/*")) for kind in ("proxies", "updates")]
    lines = [
        ("the owner's model, before the job", percent(found["owner"])),
        ("the owner's model, after the job", percent(found["fedqsn/final"])),
    ]
    if "fedavg/final" in found:
        lines.append(("FedAvg on the same articles, which sends everything", percent(found["fedavg/final"])))
    return [
        *lines,
        ("the best attacker without training", percent(attacker)),
        ("never sent", percent(never_sent)),
        ("proxies of a round", f"{sizes[0]:.1f} MB"),
        ("updates of a round", f"{sizes[1]:.1f} MB"),
    ]


def percent(share: float) -> str:
    """A share, with one digit after the point."""
    return f"{100 * share:.1f} %"


def table(lines: Sequence[tuple[str, str]]) -> str:
    """Two columns, the second aligned to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(2)]
    return "\n".join(f"{name.ljust(widths[0])}  {value.rjust(widths[1])}" for name, value in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Print what the quickstart's job was worth.")
    parser.add_argument("work", type=Path, metavar="WORK", help="folder of the quickstart, such as work")
    work = parser.parse_args(arguments).work
    print(f"\n{table(rows(work, accuracies(work)))}\n\n{NOTES}")


if __name__ == "__main__":
    main()
