"""Section transcripts: what commands print, for people, for programs and for scripts."""

from __future__ import annotations

import json
import shlex
from functools import partial
from pathlib import Path

from golden.running import SECRET, Files, Job, fedqsn, fixed_key, succeed, transcript
from golden.samples import models, whole_job

PLAN = """\
where = "outputs"
[p1]
"0" = 0.6
[[rule]]
match = "*query.weight"
quantized = false
[[rule]]
match = "*output.dense.weight"
p1 = 0.9
"""

MASK = [
    "mask global --out server --key job.key",
    "mask global --out server --key job.key",
    "mask global --out server --key job.key --p1 0.25 --force -q",
    "mask global --out server-json --key job.key --json",
    "mask global --out visible --key new.key --p1 0",
    "mask global --out visible-json --key new-json.key --p1 0 --json",
    "mask global --out filled --key filled.key --fill base --public-base base",
    "mask global --out filled-json --key filled.key --fill base --public-base base --json",
    "mask global --out hiding --key hiding.key --plan plan.toml",
    "mask global --out hiding-json --key hiding.key --json",
    "mask server --out masked --key job.key --client ann --round 1 --p2 0.2",
    "mask server --out masked-json --key job.key --client ann --p2 0.2 --schedule sticky --json",
]
QUANTIZE = [
    "quantize server --out packed --format nf4",
    "quantize server --out packed --format nf4 --force -q",
    "quantize server --out packed-json --format nf4 --json",
    "quantize filled --out dense --format int8 --layout dense --block-size 128",
    "quantize global --out double --format fp4 --double-quant --json",
    "quantize global --out planned --format nf2 --plan plan.toml --max-shard-size 8KB",
    "quantize server --out same --format none",
    "quantize server --out same-json --format none --json",
]
EXPORT = [
    "export-proxy server --out 'r1/{client}' --client ann --client bob --round 1 --p2 0.2 --key job.key "
    "--ledger ledger.jsonl",
    "export-proxy packed --out 'r2/{client}' --client ann --client bob --round 2 --p2 0.2 --key job.key "
    "--ledger ledger.jsonl --json",
    "export-proxy packed --out 'again/{client}' --client ann --client bob --round 2 --p2 0.2 --key job.key "
    "--ledger ledger.jsonl -q",
    "export-proxy global --out r3 --client carol --round 3 --p2 0 --key job.key --ledger ledger.jsonl --format int8 "
    "--schedule sticky --no-rescale --max-shard-size 8KB",
    "export-proxy global --out none --client carol --round 4 --p2 0.5 --key job.key --ledger ledger.jsonl "
    "--format none --schedule fresh --json",
    "export-proxy global --out filled-proxy --client ann --round 1 --p2 0.1 --key filled.key --ledger filled.jsonl "
    "--preset strong --public-base base",
    "export-proxy filled --out filled-json --client bob --round 1 --p2 0.1 --key filled.key --ledger filled.jsonl "
    "--fill base --public-base base --train all --format nf3 --json",
    "export-proxy global --out hidden --client ann --round 1 --p2 0.1 --key hiding.key --ledger hiding.jsonl",
    "export-proxy server --out within --client dave --round 5 --p2 0.2 --key job.key --ledger ledger.jsonl "
    "--budget 0.9 --coalition 2",
    "export-proxy server --out over --client ann --round 6 --p2 0.2 --key job.key --ledger ledger.jsonl --budget 0.7",
    "export-proxy server --out over --client eve --round 6 --p2 0.2 --key job.key --ledger ledger.jsonl "
    "--budget 0.74 --coalition 3",
]
MERGE = [
    "merge global u-ann u-bob --out merged --key job.key --ledger ledger.jsonl",
    "merge global u-bob u-ann --out merged-json --key job.key --ledger ledger.jsonl --json",
    "merge server u-ann --out server-2 --key job.key --ledger ledger.jsonl -q",
    "merge server u-ann u-bob --out server-3 --key job.key --ledger ledger.jsonl --normalize clients --server-lr 0.5",
    "merge server u-ann u-bob --out server-json --key job.key --ledger ledger.jsonl --json",
    "merge global u-ann u-bob --out controlled --key job.key --ledger ledger.jsonl --control u-own "
    "--control-weight 0.5",
    "merge global u-ann --out controlled-json --key job.key --ledger ledger.jsonl --control u-own --json",
    "merge global --restore server-2 --out restored --key job.key",
    "merge global --restore server-2 --out restored-json --key job.key --blend 0.5 --json",
    "merge filled u-trained --out trained --key filled.key --ledger filled.jsonl",
    "merge global --restore trained --out restored-trained --key filled.key --public-base base --blend 0.25 --json",
    "merge next u-late --out next-2 --key job.key --ledger ledger.jsonl",
]
ARTIFACTS = (
    "global",
    "global/model.safetensors",
    "base",
    "server",
    "packed",
    "filled",
    "r1/ann",
    "t1/ann",
    "u-ann",
    "u-ann/update.safetensors",
    "r1/ann/visible.safetensors",
    "r1/ann/model.safetensors",
    "packed/model.safetensors",
    "next",
    "next/fedqsn-residual.safetensors",
    "job.key",
    "filled.key",
    "hiding.key",
    "ledger.jsonl",
    "filled.jsonl",
)
INSPECT = [
    *(f"inspect {artifact}{how}" for artifact in ARTIFACTS for how in ("", " --json", " --quiet")),
    *(f"inspect {artifact} --plan" for artifact in ("global", "server", "packed", "filled", "r1/ann", "next")),
    "inspect global --plan --axis input",
    "inspect global --plan --axis element --json",
    "inspect global --plan --overrides plan.toml",
    "inspect global --public-base base",
    "inspect global --public-base base --json",
    "inspect global --public-base other --plan",
    "inspect server --public-base base",
    "inspect r1/ann --plan --json",
]
AUDIT = [
    "audit r1/ann r1/bob --truth global --key job.key --ledger ledger.jsonl --quiet",
    "audit --key job.key --ledger ledger.jsonl",
    "audit --key job.key --ledger ledger.jsonl --json",
    "audit r2/ann --truth next --key job.key --ledger ledger.jsonl --output a.md --format markdown",
    "audit t1/ann --truth global --key filled.key --ledger filled.jsonl --base base",
    "audit r1/own",
    "audit --init-policy --policy p.toml --quiet",
    "audit --init-policy --policy p.toml",
    "audit --init-policy",
]


def recorded(command: str, lines: list[str]) -> Files:
    """A transcript of some lines of one command."""
    return {f"transcripts/{command}.txt": "\n".join(transcript(line, fedqsn(*shlex.split(line))) for line in lines)}


def of_models(command: str, lines: list[str]) -> Files:
    """A transcript of a command that works on what `mask` makes."""
    models()
    Path("plan.toml").write_text(PLAN)
    fixed_key(SECRET, lambda: succeed(*shlex.split(MASK[8]), "--p1", "0.25"))
    if command != "mask":
        for line in (MASK[0], MASK[6], QUANTIZE[0]) if command == "export-proxy" else (MASK[0], MASK[6]):
            succeed(*shlex.split(line))
    return recorded(command, lines)


def of_job(command: str, lines: list[str]) -> Files:
    """A transcript of a command that works on everything."""
    whole_job()
    Path("plan.toml").write_text(PLAN)
    fixed_key(SECRET, lambda: succeed(*shlex.split(MASK[8]), "--p1", "0.25"))
    return recorded(command, lines)


def new_key() -> Files:
    """A job that begins with an export. Its key, and so the proxy's id, are drawn by chance."""
    models()
    line = "export-proxy global --out new --client ann --round 1 --p2 0 --p1 0 --key new.key --ledger new.jsonl"
    outcome = fedqsn(*shlex.split(line))
    drawn = json.loads(Path("new/proxy.json").read_text())["proxy_id"][:12]
    return {"transcripts/new-key.txt": transcript(line, outcome).replace(drawn, "{id}")}


def jobs() -> dict[str, Job]:
    """The jobs of this section."""
    first = {"mask": MASK, "quantize": QUANTIZE, "export-proxy": EXPORT}
    later = {"merge": MERGE, "inspect": INSPECT, "audit": AUDIT}
    return {
        "new key": new_key,
        **{command: partial(of_models, command, lines) for command, lines in first.items()},
        **{command: partial(of_job, command, lines) for command, lines in later.items()},
    }
