"""Bytes that clients send and what the model learns, by update format: `python -m benchmarks.uplink --work DIR`.

DIR is the folder of the quickstart (`make demo`): its public base, its owner's model and everybody's articles. For each
format one owner and four clients play a job with the same masks, data and seeds; only what is sent differs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedqsn_cli import client_train, evaluate, export_proxy, mask, merge

CLIENTS = ("alice", "bob", "carol", "dave")
MAX_LENGTH = 48


@dataclass(frozen=True)
class Variant:
    name: str
    form: str
    residual: bool = False


VARIANTS = [
    Variant("fp32", "fp32"),
    *(Variant(f"{form}{', residual' * kept}", form, bool(kept)) for form in ("bf16", "int8", "nf4") for kept in (0, 1)),
]


def play(work: Path, folder: Path, key: Path, variant: Variant, rounds: int, data: dict[str, Path]) -> dict[str, Any]:
    """One job; bytes a client sends in a round (the mean) and the accuracy on test articles after the last round."""
    ledger, sent = folder / "ledger.jsonl", []
    model = work / "owner"
    mask(model, folder / "server-0", key=key, p1=0.1)
    for number in range(1, rounds + 1):
        now = folder / f"r{number}"
        proxies = {"client": CLIENTS, "round": number, "p2": 0.1, "key": key, "ledger": ledger}
        export_proxy(folder / f"server-{number - 1}", now / "{client}", **proxies)
        for name in CLIENTS:
            kept = {"residual": folder / f"{name}.residual"} if variant.residual else {}
            common = {"lr": 2e-4, "max_length": MAX_LENGTH, "seed": number, "update_format": variant.form}
            out = now / f"{name}-update"
            client_train(now / name, out, data=data[name], **common, **kept)
            sent.append(sum(path.stat().st_size for path in out.iterdir()))
        updates = [now / f"{name}-update" for name in CLIENTS]
        merge(model, updates, now / "global", key=key, ledger=ledger)
        model = now / "global"
        mask(model, folder / f"server-{number}", key=key)
    result = evaluate(model, data=work / "data" / "test.jsonl", max_length=MAX_LENGTH)
    return {"update": variant.name, "bytes": sum(sent) // len(sent), "accuracy": result.accuracy, "loss": result.loss}


def shortened(source: Path, target: Path, examples: int) -> Path:
    """The first rows of a data file."""
    target.write_text("".join(source.read_text("utf-8").splitlines(keepends=True)[:examples]), "utf-8")
    return target


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results in Markdown."""
    first = results[0]["bytes"]
    lines = ["| update | MB a client sends in a round | of fp32 | accuracy | loss |", "|---|---|---|---|---|"]
    for row in results:
        size = f"{row['bytes'] / 1e6:.1f} | {row['bytes'] / first:.1%}"
        lines.append(f"| {row['update']} | {size} | {row['accuracy']:.3f} | {row['loss']:.4f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Bytes up and accuracy by update format, on the quickstart's data.")
    parser.add_argument("--work", type=Path, required=True, help="the quickstart's folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=200, help="of each client at most")
    parser.add_argument("--only", nargs="*", help="names of formats, such as nf4")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    given = parser.parse_args(arguments)
    results = []
    with tempfile.TemporaryDirectory() as name:
        root, source = Path(name), given.work / "data"
        data = {c: shortened(source / f"{c}.jsonl", root / f"{c}.jsonl", given.examples) for c in CLIENTS}
        for variant in VARIANTS:
            if not given.only or variant.form in given.only:
                folder = root / variant.name
                folder.mkdir()
                results.append(play(given.work, folder, root / "job.key", variant, given.rounds, data))
                shutil.rmtree(folder)
                print(json.dumps(results[-1]), flush=True)
    print(table(results))
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
