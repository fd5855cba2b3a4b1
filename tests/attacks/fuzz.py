"""Damage every file of a small job, give it to every parser and command, and count how they end.

    python -m attacks.fuzz --seconds 60 --seed 1 --save FOLDER

A good end is a result, or an error that fedqsn raises on purpose. Anything else is a fault: an exception of another
class (exit 70), more than five seconds of processor time, or more than a GiB. Each new kind of fault is saved as a
file, by the place in the code where it arose; `corpus/` holds those that were found and mended, which `test_fuzz.py`
plays again.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from attacks.mutations import damaged
from fedqsn_cli import strictjson
from fedqsn_cli.artifacts import ledger
from fedqsn_cli.artifacts.ledger_head import read_head
from fedqsn_cli.artifacts.manifests import ModelManifest, ProxyManifest, UpdateManifest, read_manifest
from fedqsn_cli.auditing import policy_file
from fedqsn_cli.auditing.report.json import read_measures
from fedqsn_cli.checkpoint import Checkpoint, read_header
from fedqsn_cli.cli import exit_codes
from fedqsn_cli.courier.layout import Invitation
from fedqsn_cli.courier.orders import Order
from fedqsn_cli.courier.parts import Part, Parts
from fedqsn_cli.courier.site import TEMPLATE, SiteSettings
from fedqsn_cli.crypto import dsse
from fedqsn_cli.crypto.attestation import Attestation, attestation_bytes, read_attestation
from fedqsn_cli.crypto.keys import VerifyKey, load_signing_key
from fedqsn_cli.crypto.signature import bundle_bytes, verify_folder
from fedqsn_cli.errors import FedqsnError
from fedqsn_cli.masks import job_key
from fedqsn_cli.merging.step.server_optimizer import open_state
from fedqsn_cli.models.model import model_tensors, open_model
from fedqsn_cli.models.plan_file import load_overrides
from fedqsn_cli.options import ProposalOptions
from support.attacks import World, make_world
from support.processes import run
from support.tables import read_table

CORPUS = Path(__file__).parent / "corpus"
MEMORY_DISK = "/dev/shm"  # three to five times as many inputs for most parsers
SECONDS, WAITING = 5, 60  # of processor time, and by the clock, for one input
MEMORY = 1 << 20  # KiB that all inputs together may add to the peak


class Hang(BaseException):
    """An input took too long. No `except Exception` may catch it."""


@dataclass(frozen=True)
class Entry:
    """Something that reads a file.

    Args:
        name: of the entry point. file: which file of the job is damaged, by its path in it.
        call: is given the job.
    """

    name: str
    file: str
    call: Callable[[World], object]

    @property
    def key(self) -> str:
        return f"{self.name} {self.file}"


def _command(*words: str) -> Callable[[World], object]:
    """A command on paths in the job; `OUT` stands for an output that is removed again."""

    def call(world: World) -> object:
        out = world.root / "out"
        try:
            return run(*(_word(word, world) for word in words))
        finally:
            shutil.rmtree(out, ignore_errors=True)

    return call


def _word(word: str, world: World) -> str:
    return str(world.root / word[1:]) if word.startswith("@") else word


def _table(name: str) -> Callable[[World], object]:
    return lambda world: read_table(world.root / name)


def _order(world: World) -> object:
    """An order that says what a hostile owner may say: whatever it is, it is signed."""
    payload, signature, key = _signed(world, "order.json")
    return Order.opened(strictjson.dumps(dsse.envelope(payload, signature)), key)


def _attestation(world: World) -> object:
    """An attestation, likewise."""
    payload, signature, key = _signed(world, "attestation.json")
    (world.root / "attestation").write_text(strictjson.dumps(dsse.envelope(payload, signature)))
    return read_attestation(world.root / "attestation", key)


def _signature(world: World) -> object:
    """A signature of files, likewise."""
    payload, signature, key = _signed(world, "signature.json")
    (world.root / "signed-too/model.sig").write_bytes(bundle_bytes(payload, signature, key))
    return verify_folder(world.root / "signed-too", key)


def _signed(world: World, name: str) -> tuple[bytes, bytes, VerifyKey]:
    """A statement of the owner, its signature, and the key to verify it with."""
    key, payload = load_signing_key(world.root / "owner.key"), (world.root / name).read_bytes()
    return payload, dsse.sign(payload, key), key.public_key()


_JOB = ("--key", "@job.key", "--ledger", "@ledger.jsonl")
_OUT = ("--out", "@out")
_CLIENT = ("--client", "alice", "--round", "1", "--p2", "0.25")
_ADAM = ("--server-optimizer", "adam", "--server-lr", "0.001")
_DATA = ("--data", "@data.jsonl")
_TRUTH = ("--truth", "@model", *_JOB)

PARSERS: dict[str, tuple[Callable[[World], object], tuple[str, ...]]] = {
    "json": (lambda w: strictjson.loads((w.root / "model/config.json").read_bytes(), "file"), ("model/config.json",)),
    "header": (lambda w: read_header(w.proxy / "model.safetensors"), ("proxy/model.safetensors",)),
    "fedqsn.json": (lambda w: read_manifest(w.root / "server", ModelManifest), ("server/fedqsn.json",)),
    "proxy.json": (lambda w: read_manifest(w.proxy, ProxyManifest), ("proxy/proxy.json",)),
    "update.json": (lambda w: read_manifest(w.update, UpdateManifest), ("update/update.json",)),
    "ledger": (lambda w: ledger.read(w.ledger), ("ledger.jsonl", "ledger.jsonl.head")),
    "ledger head": (lambda w: read_head(w.ledger), ("ledger.jsonl.head",)),
    "key": (lambda w: job_key.load(w.key), ("job.key",)),
    "plan file": (lambda w: load_overrides(w.root / "plan.toml"), ("plan.toml",)),
    "policy": (lambda w: policy_file.load(w.root / "policy.toml"), ("policy.toml",)),
    "baseline": (lambda w: read_measures(w.root / "baseline.json"), ("baseline.json",)),
    **{name: (_table(name), (name,)) for name in ("data.jsonl", "data.json", "data.csv", "data.parquet")},
    "packed tensors": (
        lambda w: model_tensors(Checkpoint.open(w.root / "quantized")),
        ("quantized/model.safetensors", "quantized/config.json"),
    ),
    "shards": (lambda w: Checkpoint.open(w.root / "sharded"), ("sharded/model.safetensors.index.json",)),
    "order": (_order, ("order.json",)),
    "attestation": (_attestation, ("attestation.json",)),
    "signature": (_signature, ("signature.json",)),
    "server state": (
        lambda w: open_state(open_model(str(w.root / "adam")), job_key.load(w.key), "adam"),
        ("adam/fedqsn-server-state.safetensors", "adam/fedqsn.json"),
    ),
    "invitation": (lambda w: Invitation.read(w.root / "invitation.json"), ("invitation.json",)),
    "site.toml": (lambda w: SiteSettings.read(w.root / "site.toml"), ("site.toml",)),
    "model": (
        lambda w: open_model(str(w.root / "server")),
        ("server/config.json", "server/fedqsn.json", "server/model.safetensors"),
    ),
}

_OF_A_MODEL = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
_OF_A_PROXY = (*_OF_A_MODEL, "proxy.json", "visible.safetensors")

COMMANDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "inspect model": (
        ("inspect", "@server", "--show-plan"),
        tuple(f"server/{x}" for x in (*_OF_A_MODEL, "fedqsn.json")),
    ),
    "inspect proxy": (("inspect", "@proxy", "--show-plan"), tuple(f"proxy/{x}" for x in _OF_A_PROXY)),
    "inspect update": (("inspect", "@update"), ("update/update.json", "update/update.safetensors")),
    "inspect key": (("inspect", "@job.key"), ("job.key",)),
    "inspect ledger": (("inspect", "@ledger.jsonl"), ("ledger.jsonl", "ledger.jsonl.head")),
    "mask": (("mask", "@model", *_OUT, "--key", "@job.key"), (*(f"model/{x}" for x in _OF_A_MODEL), "job.key")),
    "quantize": (("quantize", "@server", *_OUT, "--format", "nf4"), ("server/config.json", "server/fedqsn.json")),
    "export-proxy": (
        ("export-proxy", "@quantized", *_OUT, *_CLIENT, *_JOB),
        (*(f"quantized/{x}" for x in (*_OF_A_MODEL, "fedqsn.json")), "job.key", "ledger.jsonl", "ledger.jsonl.head"),
    ),
    "client-train": (
        ("client-train", "@proxy", *_OUT, *_DATA, "--max-steps", "1"),
        (*(f"proxy/{x}" for x in _OF_A_PROXY), "data.jsonl"),
    ),
    "evaluate": (("evaluate", "@model", *_DATA), (*(f"model/{x}" for x in _OF_A_MODEL), "data.jsonl")),
    "merge": (
        ("merge", "@model", "@update", *_OUT, *_JOB),
        ("update/update.json", "update/update.safetensors", "model/config.json", "ledger.jsonl", "job.key"),
    ),
    "inspect partial": (("inspect", "@partial"), ("partial/partial.json", "partial/partial.safetensors")),
    "merge partial": (
        ("merge", "@model", "@partial", *_OUT, *_JOB),
        ("partial/partial.json", "partial/partial.safetensors"),
    ),
    "merge adapters": (
        ("merge", "@model", "@lora", *_OUT, *_JOB),
        ("lora/update.json", "lora/adapter_model.safetensors", "lora/adapter_config.json", "lora/update.safetensors"),
    ),
    "verify": (
        ("verify", "@signed", "--key", "@owner.pub"),
        ("signed/model.sig", "signed/proxy.json", "owner.pub"),
    ),
    "unseal": (("unseal", "@sealed", *_OUT, "--key", "@owner.key"), ("sealed", "owner.key")),
    "audit": (
        ("audit", "@proxy", *_TRUTH, "--policy", "@policy.toml", "--baseline", "@baseline.json"),
        (*(f"proxy/{x}" for x in _OF_A_PROXY), "policy.toml", "baseline.json", "ledger.jsonl", "job.key"),
    ),
}

ENTRIES = [
    *(Entry(name, file, call) for name, (call, files) in PARSERS.items() for file in files),
    *(Entry(name, file, _command(*words)) for name, (words, files) in COMMANDS.items() for file in files),
]


def prepared(root: Path) -> World:
    """A job to damage, with a plan file, a policy and a baseline beside it."""
    world = make_world(root)
    (root / "plan.toml").write_text('where = "all"\n\n[[rule]]\nmatch = "*.query.*"\nmasked = true\np1 = 0.5\n')
    (root / "policy.toml").write_text(policy_file.template())
    rows = [json.loads(line) for line in world.data.read_text().splitlines()]
    (root / "data.json").write_text(json.dumps(rows))
    (root / "data.csv").write_text("text,label\n" + "".join(f'"{row["text"]}",{row["label"]}\n' for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), root / "data.parquet")
    _others(world)
    audited = run("audit", world.proxy, *(_word(word, world) for word in _TRUTH), "--format", "json")
    (root / "baseline.json").write_text(audited.out)
    return world


def _others(world: World) -> None:
    """Artifacts that not every job has: shards, sums, adapters, states, signatures, and what a courier carries."""
    root, new = world.root, tuple(_word(word, world) for word in _JOB)
    train = ("client-train", world.proxy, "--data", world.data, "--max-steps", "1")
    for words in (
        ("mask", world.model, "--out", root / "sharded", "--key", world.key, "--max-shard-size", "50KB"),
        ("merge", world.model, world.update, "--partial", "--out", root / "partial", *new),
        ("merge", world.model, world.update, "--out", root / "adam", *_ADAM, *new),
        (*train, "--out", root / "lora", "--method", "lora"),
        ("keygen", root / "owner.key"),
        ("export-proxy", root / "quantized", "--out", root / "signed", *_CLIENT, *new, "--sign", root / "owner.key"),
        ("seal", root / "signed", "--to", root / "owner.pub", "--out", root / "sealed"),
    ):
        ended = run(*words)
        assert ended.code == 0, ended
    (root / "site.toml").write_text(TEMPLATE.format(data='"a"', eval_data="", device='"cpu"', max_length=32))
    (root / "invitation.json").write_bytes(Invitation("p", "localhost", 1, "", "").to_bytes())
    parts, digest = Parts((Part(0, 9, "0" * 64),)), "0" * 64
    order = Order("alice", digest, digest, parts, ProposalOptions(epochs=1.0, lr=1e-3, batch_size=8))
    key = load_signing_key(root / "owner.key")
    told = Attestation("PASSED", "passed", "fedqsn", digest, {"proxy 1": digest}, ["FQ001"], [])
    for name, envelope in (
        ("order.json", json.loads(order.signed(key))),
        ("attestation.json", json.loads(attestation_bytes(told, key))),
        ("signature.json", json.loads((root / "signed/model.sig").read_bytes())["dsseEnvelope"]),
    ):
        (root / name).write_bytes(base64.b64decode(envelope["payload"]))
    shutil.copytree(root / "signed", root / "signed-too")


@contextmanager
def _alarmed() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hang

    clocks = ((signal.SIGPROF, signal.ITIMER_PROF, SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, WAITING))
    before = [signal.signal(number, ring) for number, _, _ in clocks]
    for _, clock, seconds in clocks:
        signal.setitimer(clock, seconds)
    try:
        yield
    finally:
        for (number, clock, _), handler in zip(clocks, before, strict=True):
            signal.setitimer(clock, 0)
            signal.signal(number, handler)


def outcome(entry: Entry, world: World, data: bytes) -> tuple[str, str | None]:
    """How an entry point ends on a damaged file, in a word; and the kind of its fault, if it is one."""
    path = world.root / entry.file
    whole, mode = path.read_bytes(), path.stat().st_mode
    bugs: list[BaseException] = []

    def watched(error: BaseException, command: str) -> tuple[str, int]:
        line, code = exit_codes_of(error, command)
        if code == exit_codes.EXIT_BUG or isinstance(error, Hang):
            bugs.append(error)
        return line, code

    exit_codes_of, exit_codes.error_to_exit = exit_codes.error_to_exit, watched
    try:
        path.write_bytes(data)
        with _alarmed():
            ended = entry.call(world)
    except FedqsnError:
        return "refused", None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        bugs.append(error)
    finally:
        exit_codes.error_to_exit = exit_codes_of
        path.write_bytes(whole)
        path.chmod(mode)
    if bugs:
        return "hang" if isinstance(bugs[0], Hang) else "crash", _kind(bugs[0])
    code = getattr(ended, "code", 0)
    return {0: "accepted", 2: "refused"}.get(code, f"exit {code}"), None


def _kind(error: BaseException) -> str:
    """The class of an error, and the last line of fedqsn that it came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "fedqsn_cli" in frame.filename]
    place = f"{Path(frames[-1].filename).stem}.{frames[-1].name}" if frames else "elsewhere"
    return f"{type(error).__name__} in {place}"


def for_a_time(entries: list[Entry], seconds: float) -> Iterator[Entry]:
    """Whose turn it is, until the time is over: each has an equal share of it."""
    taken = dict.fromkeys(entries, 0.0)  # seconds
    end = (now := time.monotonic()) + seconds
    while now < end:
        entry = min(taken, key=taken.__getitem__)
        yield entry
        taken[entry] += (later := time.monotonic()) - now
        now = later


def fuzz(world: World, turns: Iterable[Entry], draw: random.Random, save: Path | None) -> tuple[Counter[Any], set[str]]:
    """Damage a file of the world for each of these entry points in turn.

    Returns:
        How often each entry point ended how, and the kinds of faults.
    """
    counts, kinds = Counter[tuple[str, str]](), set[str]()
    whole = {entry.file: (world.root / entry.file).read_bytes() for entry in ENTRIES}
    for entry in turns:
        data = damaged(whole[entry.file], draw)
        ended, kind = outcome(entry, world, data)
        counts[entry.name, ended] += 1
        if kind is not None and kind not in kinds:
            kinds.add(kind)
            if save is not None:
                save_case(save, entry, data, kind)
    return counts, kinds


def save_case(folder: Path, entry: Entry, data: bytes, kind: str) -> None:
    """Write an input that an entry point failed on."""
    folder.mkdir(parents=True, exist_ok=True)
    case = {"entry": entry.key, "kind": kind, "data": base64.b64encode(data).decode()}
    name = "".join(c if c.isalnum() else "-" for c in f"{entry.name} {kind}")
    (folder / f"{name}.json").write_text(json.dumps(case, indent=1) + "\n")


def main() -> int:
    """Fuzz all entry points; exit 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", default="", help="entry points whose name begins so")
    parser.add_argument("--save", type=Path, default=Path("fuzz-faults"), help="folder for new kinds of faults")
    asked = parser.parse_args()
    entries = [entry for entry in ENTRIES if entry.key.startswith(asked.only)]
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK if os.access(MEMORY_DISK, os.W_OK) else None) as folder:
        world = prepared(Path(folder))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        draw = random.Random(asked.seed)
        turns = for_a_time(draw.sample(entries, len(entries)), asked.seconds)
        counts, kinds = fuzz(world, turns, draw, asked.save)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    for (name, ended), count in sorted(counts.items()):
        print(f"{name:16s} {ended:10s} {count:8d}")
    print(f"seed {asked.seed}: {sum(counts.values())} inputs, {len(kinds)} kinds of faults, memory grew by {grown} KiB")
    for kind in sorted(kinds):
        print(f"  {kind}")
    return int(bool(kinds) or grown > MEMORY)


if __name__ == "__main__":
    sys.exit(main())
