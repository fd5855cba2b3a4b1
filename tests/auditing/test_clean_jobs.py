"""No false alarm: proxies of honest exports pass, whatever the options, in the first round and after a merge."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedqsn_cli import audit, merge
from fedqsn_cli.auditing.findings import Audit
from support.helpers import SHAPES, noise, send
from support.scenario import JobFolder, Scenario, job_folder

CLIENTS = ("ann", "bob")
COMBINATIONS = 60
FEW = (2, 9, 17, 24, 42)


@dataclass(frozen=True)
class CleanJob:
    """A scenario with the options of an export that it does not have.

    Args:
        more: of export-proxy.
    """

    scenario: Scenario
    more: dict[str, Any]

    @property
    def trains_fill(self) -> bool:
        return self.more.get("train") == "all"


def drawn(number: int) -> CleanJob:
    """The job of that number: every option takes every value within a few numbers."""
    draw = random.Random(number)
    fill = ("zero", "base")[number % 2]
    format = ("nf4", "fp4", "int8", "nf3", "nf2", "none")[number % 6]
    nothing_sent = fill == "base" and draw.random() < 0.2
    layout = draw.choice(("bnb", "dense", None)) if format in {"nf4", "fp4", "int8"} else None
    scenario = Scenario(
        family=sorted(SHAPES)[number % len(SHAPES)],
        dtype=draw.choice(("F32", "F16", "BF16")),
        hidden=draw.choice((32, 47, 64)),
        inner=draw.choice((48, 51, 128)),
        shards=draw.choice((1, 3)),
        axis="neuron" if nothing_sent else draw.choice(("neuron", "input", "element")),
        format=format,
        layout=layout,
        block_size=draw.choice((32, 64, 256)),
        double_quant=format in {"nf4", "fp4"} and layout != "dense" and fill == "zero" and draw.random() < 0.5,
        fill=fill,
        p1=1.0 if nothing_sent else draw.choice((0.0, 0.1, 0.5, 0.9)),
        p2=draw.choice((0.0, 0.1, 0.5)),
    )
    more: dict[str, Any] = {"schedule": draw.choice(("fresh", "sticky"))}
    if nothing_sent or (fill == "base" and draw.random() < 0.5):
        more["train"] = "all"
    if draw.random() < 0.3:
        more["max_shard_size"] = "60KB"
    if draw.random() < 0.3:
        more["rescale"] = False
    if not nothing_sent and draw.random() < 0.3:
        more |= draw.choice(({"where": "outputs"}, {"layers": "0"}, {"p1_schedule": "0=0.5"}))
    return CleanJob(scenario, more)


def audited(folder: JobFolder, proxies: Path, truth: Path, **given: Any) -> Audit:
    base = folder.root / "base"
    return audit(
        [proxies / client for client in CLIENTS],
        truth=truth,
        key=folder.key,
        ledger=folder.root / "ledger.jsonl",
        public_base=base if base.exists() else None,
        **given,
    )


def two_rounds(job: CleanJob, folder: JobFolder) -> list[Audit]:
    """The audits of the first round, of the merge after it, and of the second one."""
    ledger, more = folder.root / "ledger.jsonl", job.more
    first = folder.export(folder.model, "proxies", **more)
    source, given = folder.model, {}
    if job.trains_fill:
        source = folder.server(folder.model, "server")
        given = {"server": source}
    updates = [send(first / client, folder.root / f"update-{client}", noise(n)) for n, client in enumerate(CLIENTS)]
    after = folder.root / "after"
    merge(source, updates, out=after, key=folder.key, ledger=ledger)
    truth = folder.model if job.trains_fill else after
    merged = {} if job.trains_fill else {"after": after}
    audits = [audited(folder, first, folder.model, **given, **merged)]
    second = folder.export(after, "second", round=2, **more)
    return [*audits, audited(folder, second, truth, **({"server": after} if job.trains_fill else {}))]


def check(number: int) -> None:
    job = drawn(number)
    with job_folder(job.scenario) as folder:
        for found in two_rounds(job, folder):
            serious = [(one.rule, one.scope, one.message) for one in found.findings if one.severity != "info"]
            assert (found.exit_code, serious) == (0, [])
            assert {one.why.split()[0] for one in found.checked if one.rule == "FQ105"} == {"0"}


@pytest.mark.parametrize("number", FEW)
def test_clean_proxies_pass(number: int) -> None:
    check(number)


@pytest.mark.soak
@pytest.mark.parametrize("number", range(COMBINATIONS))
def test_clean_proxies_of_every_kind_pass(number: int) -> None:
    check(number)
