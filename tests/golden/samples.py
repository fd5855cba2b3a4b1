"""A small job on disk, with one of everything that the product makes: what transcripts and errors are about.

global base          the owner's model and a public one
job.key              p1 0.25; ledger.jsonl holds its releases
server packed        without hidden neurons, and that in nf4
r1/ann r1/bob r1/own proxies of the first round, updates of them in u-ann, u-bob, u-own
next                 the model after that round, with a residual; of it r2/ann and u-late
filled.key filled    another job: p1 0.5, the public base in the holes, which clients train; t1/ann, u-trained
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from contextlib import chdir
from functools import cache
from pathlib import Path
from typing import Any

from fedqsn_cli import merge, quantize
from golden.inputs import Update, draft, make_model, noise
from golden.running import OTHER_SECRET, SECRET, export_proxy, fixed_key, mask
from support.raw_safetensors import read_model

KEY, LEDGER = Path("job.key"), Path("ledger.jsonl")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1}
FILLED: dict[str, Any] = {"fill": "base", "public_base": "base"}


def models() -> None:
    """Models and keys alone."""
    make_model(Path("global"), "bert", dtype="BF16", hidden=32)
    make_model(Path("base"), "bert", dtype="BF16", hidden=32, seed=1)
    config = Path("global/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | SIZES))
    fixed_key(SECRET, lambda: mask("global", "scratch", key=KEY, p1=0.25))
    other = Path("filled.key")
    fixed_key(OTHER_SECRET, lambda: mask("global", "scratch", key=other, p1=0.5, **FILLED))


def whole_job() -> None:
    """Everything, in the working directory."""
    made = _whole_job()
    for path, (found, content) in made.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Path(path).mkdir(exist_ok=True)
        else:
            Path(path).write_bytes(content)
        Path(path).chmod(stat.S_IMODE(found.st_mode))
    for path, (found, _) in made.items():  # last: a folder's time changes with what is put into it, and audits read it
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


@cache
def _whole_job() -> dict[str, tuple[os.stat_result, bytes | None]]:
    """Its files and folders, made once in each process: nothing in them depends on where they are."""
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        _make_whole_job()
        paths = sorted(Path().rglob("*"))
        return {str(path): (path.stat(), path.read_bytes() if path.is_file() else None) for path in paths}


def _make_whole_job() -> None:
    models()
    mask("global", "server", key=KEY)
    mask("global", "filled", key="filled.key", **FILLED)
    quantize("server", "packed", format="nf4")
    usual: dict[str, Any] = {"key": KEY, "ledger": LEDGER, "p2": 0.2}
    export_proxy("server", "r1/{client}", client=("ann", "bob"), round=1, **usual)
    export_proxy("server", "r1/own", client="own", round=1, **usual | {"p2": 0.0})
    of_filled: dict[str, Any] = {"key": "filled.key", "ledger": "filled.jsonl", "p2": 0.2, "train": "all", **FILLED}
    export_proxy("filled", "t1/ann", client="ann", round=1, **of_filled)
    for number, name in enumerate(("ann", "bob", "own")):
        send(f"r1/{name}", f"u-{name}", number, examples=10 * number + 7)
    send("t1/ann", "u-trained", 4)
    merge("global", ["u-ann", "u-bob"], "next", key=KEY, ledger=LEDGER)
    export_proxy("next", "r2/ann", client="ann", round=2, **usual)
    send("r2/ann", "u-late", 5)


def send(proxy: str, folder: str, seed: int, *, examples: int = 10) -> Update:
    """Write an update for a proxy; it can be changed and written anew."""
    shapes = {name: bits.shape for name, (dtype, bits) in read_model(Path("global")).items() if dtype != "I64"}
    update = draft(Path(proxy), shapes, noise(seed), examples=examples)
    update.write(Path(folder))
    return update
