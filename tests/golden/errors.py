"""Section errors: the line and the exit code of all that can be wrong; and that nothing was written then."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import fedqsn_cli
from golden.inputs import Update, make_config, make_model, make_tensors
from golden.running import Files, Job, Records, fedqsn, refusal
from golden.samples import send, whole_job
from golden.wrong_lines import EVE, JOB, WRONG_OPTIONS, WRONG_PLACES
from support.raw_safetensors import read_file, write_file, write_model

SPOILT = Path("spoilt")
UP, NORM = "bert.encoder.layer.0.intermediate.dense.weight", "bert.embeddings.LayerNorm.weight"
Damage = Callable[[Path], object]


# ------------------------------------------------------------------------------------------------ running

Stamp = tuple[int, int, int]  # what tells one state of a file from another one


class Desk:
    """The working directory, with all that wrong command lines name: tells what they do to it, and undoes it."""

    def __init__(self) -> None:
        whole_job()
        make_model(Path("llama"), "llama", hidden=32)
        Path("plan.toml").write_text('[[rule]]\nmatch = "*.weight"\nquantized = false\n')
        Path("data.jsonl").write_text('{"text": "w3 w4", "label": 1}\n{"text": "w5", "label": 0}\n')
        self._contents = {path: Path(path).read_bytes() for path in self._stamps() if Path(path).is_file()}

    def outcome(self, line: str) -> str:
        """How a command ends, on one line, and what it did."""
        before = self._stamps()
        done = fedqsn(*shlex.split(line))
        said = " / ".join(f"{done.out}{done.err}".splitlines())
        return f"[{done.code}] {said}{self._undone(before)}"

    def refused(self, call: Callable[[], object]) -> str:
        """How a call ends, on one line, and what it did."""
        before = self._stamps()
        try:
            call()
            said = "no error"
        except Exception as error:  # its class is a part of the corpus
            said = refusal(error)
        return said + self._undone(before)

    def _stamps(self) -> dict[str, Stamp]:
        """All that is there."""
        found = {}
        for folder, folders, files in os.walk("."):
            for name in (*folders, *files):
                path = os.path.join(folder, name)
                status = os.lstat(path)
                changed = 0 if name in folders else status.st_mtime_ns
                found[path.removeprefix("./")] = (status.st_mode, status.st_size, changed)
        return found

    def _undone(self, before: dict[str, Stamp]) -> str:
        """What is new or another one, in words. Makes it as it was."""
        after = self._stamps()
        written = sorted(path for path in after if path not in before)
        changed = sorted(path for path in before if after.get(path) != before[path] and path in self._contents)
        for path in map(Path, reversed(written)):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        for name in changed:
            Path(name).write_bytes(self._contents[name])
        effects = [("wrote", written), ("changed", changed)]
        said = "; ".join(f"{what} {', '.join(paths)}" for what, paths in effects if paths)
        return f" ({said})" if said else ""


def lines(name: str, wrong: Sequence[str]) -> Files:
    """The outcome of each command line."""
    desk = Desk()
    return {f"errors/{name}.json": {f"fedqsn {line}": desk.outcome(line) for line in wrong}}


def damaged(name: str, source: str, damages: dict[str, Damage], commands: Sequence[str]) -> Files:
    """What commands say about each damage of an artifact, which lies at `spoilt`."""
    desk = Desk()
    records: Records = {}
    for what, damage in damages.items():
        copy(Path(source))
        damage(SPOILT)
        records |= {f"{what}: fedqsn {line}": desk.outcome(line) for line in commands}
    return {f"errors/{name}.json": records}


def copy(source: Path) -> None:
    """Put a fresh copy of an artifact at `spoilt`."""
    remove(SPOILT)
    if source.is_dir():
        shutil.copytree(source, SPOILT)
    elif source.exists():
        shutil.copy(source, SPOILT)
        head = source.with_name(f"{source.name}.head")  # of a ledger
        if head.exists():
            shutil.copy(head, f"{SPOILT}.head")


def remove(path: Path) -> None:
    """Remove whatever is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ damages


def each(file: str, damages: dict[str, Damage]) -> dict[str, Damage]:
    """Damages of a file, as damages of the folder that it is in."""
    return {f"{file} {what}": partial(_inside, file, damage) for what, damage in damages.items()}


def _inside(file: str, damage: Damage, folder: Path) -> None:
    damage(folder / file)


def edit(change: Callable[[bytes], bytes]) -> Damage:
    """Other bytes."""
    return lambda path: path.write_bytes(change(path.read_bytes()))


def become(data: bytes | str) -> Damage:
    """Altogether other bytes."""
    return lambda path: path.write_bytes(data if isinstance(data, bytes) else data.encode())


def flip(position: int) -> Damage:
    """One bit is another one."""

    def change(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[position] ^= 1
        return bytes(changed)

    return edit(change)


def fields(**values: Any) -> Damage:
    """Other fields in a JSON object; `...` takes one out."""

    def change(data: bytes) -> bytes:
        document = json.loads(data) | values
        return json.dumps({name: value for name, value in document.items() if value is not ...}).encode()

    return edit(change)


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Another header of a safetensors file, with the same data behind it."""

    def whole(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        document = json.loads(data[8 : 8 + length])
        change(document)
        text = json.dumps(document).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return edit(whole)


def link(target: str) -> Damage:
    """A symbolic link stands there."""

    def damage(path: Path) -> None:
        remove(path)
        path.symlink_to(target)

    return damage


def folder(path: Path) -> None:
    """A folder stands there."""
    remove(path)
    path.mkdir()


FILE: dict[str, Damage] = {
    "empty": become(b""),
    "gone": remove,
    "a folder": folder,
    "a dangling link": link("nowhere"),
    "a device": link("/dev/zero"),
}
MANIFEST: dict[str, Damage] = FILE | {
    "no JSON": become("{"),
    "no UTF-8": become(b"\xff\xfe"),
    "a list": become("[]"),
    "NaN": become('{"x": NaN}'),
    "a doubled field": become('{"format": "a", "format": "b"}'),
    "an unknown field": fields(extra=1),
    "another format": fields(format="fedqsn/9"),
    "too deep": become("[" * 100_000),
}
TENSORS: dict[str, Damage] = FILE | {
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 4),
    "longer": edit(lambda data: data + bytes(4)),
    "of seven bytes": become(bytes(7)),
    "a pickle": become(b"\x80\x04\x95" + bytes(100)),
    "an endless header": edit(lambda data: (2**62).to_bytes(8, "little") + data[8:]),
    "a header that is cut": edit(lambda data: data[:60]),
    "a header that is no JSON": edit(lambda data: data[:8] + b"{" * 20 + data[28:]),
    "a header without brace": edit(lambda data: data[:8] + b" " + data[9:]),
    "without tensors": become((2).to_bytes(8, "little") + b"{}"),
    "metadata of numbers": header(lambda document: document.update(__metadata__={"a": 1})),
    "an unknown dtype": header(lambda document: document[NORM].update(dtype="F4")),
    "a negative shape": header(lambda document: document[NORM].update(shape=[-1])),
    "another shape": header(lambda document: document[NORM].update(shape=[9])),
    "offsets turned round": header(lambda document: document[NORM]["data_offsets"].reverse()),
    "overlapping tensors": header(lambda document: document[NORM].update(data_offsets=first_of(document))),
    "an entry with more": header(lambda document: document[NORM].update(more=1)),
    "a tensor left out": header(lambda document: document.pop(NORM)),
}


def first_of(document: dict[str, Any]) -> list[int]:
    """The place of the first numbers, as many as NORM has."""
    begin, end = document[NORM]["data_offsets"]
    return [0, end - begin]


# ------------------------------------------------------------------------------------------------ updates


def rewritten(change: Callable[[Update], object]) -> Damage:
    """An update with other content, and a digest that fits."""

    def damage(path: Path) -> None:
        update = send("r1/ann", str(path), 0)
        change(update)
        update.write(path)

    return damage


def put(name: str, value: float) -> Damage:
    """One number of an update is this."""

    def change(update: Update) -> None:
        update.tensors[name][1].view(np.float32).reshape(-1)[-1] = value

    return rewritten(change)


def put_tensor(name: str, change: Callable[[Any], tuple[str, Any]]) -> Damage:
    """One tensor of an update is another one, made from its bits."""
    return rewritten(lambda update: update.tensors.update({name: change(update.tensors[NORM][1])}))


FILES = {"update.safetensors": "0" * 64}
UPDATES: dict[str, Damage] = {
    "NaN in a weight": put(UP, float("nan")),
    "infinity in a norm": put(NORM, float("-inf")),
    "a huge number": put(UP, 1e30),
    "the largest number": put(UP, 3.4e38),
    "a large norm": put(NORM, 1e4),
    "one tensor more": put_tensor("bert.extra.weight", lambda bits: ("F32", bits)),
    "a tensor missing": rewritten(lambda update: update.tensors.pop(UP)),
    "a tensor of another shape": put_tensor(UP, lambda bits: ("F32", bits)),
    "a tensor of another dtype": put_tensor(NORM, lambda bits: ("BF16", bits.astype(np.uint16))),
    "another precision than it says": rewritten(lambda update: update.manifest.update(precision="fp16")),
    **each("update.safetensors", TENSORS | {"flipped": flip(-1)}),
    **each("update.json", MANIFEST),
    **each(
        "update.json",
        {
            "without examples": fields(num_examples=0),
            "half an example": fields(num_examples=10.5),
            "true examples": fields(num_examples=True),
            "many examples": fields(num_examples=2**53 + 1),
            "no examples": fields(num_examples=...),
            "negative steps": fields(steps=-1),
            "unknown precision": fields(precision="fp8"),
            "losses missing": fields(losses=None),
            "proxy id short": fields(proxy_id="abc"),
            "proxy id unknown": fields(proxy_id="1" * 64),
            "proxy.json another": fields(proxy_sha256="1" * 64),
            "digest wrong": fields(files=FILES),
            "files none": fields(files={}),
            "files one more": fields(files=FILES | {"more.safetensors": "0" * 64}),
            "files elsewhere": fields(files={"../u-bob/update.safetensors": "0" * 64}),
        },
    ),
}


# ------------------------------------------------------------------------------------------------ proxies, models

PROXIES: dict[str, Damage] = {
    **each("proxy.json", MANIFEST),
    **each(
        "proxy.json",
        {
            "another job": fields(job="x"),
            "negative round": fields(round=-1),
            "without tensors": fields(tensors={}),
            "without groups": fields(groups={}),
            "a path in files": fields(files={"../model.safetensors": "0" * 64}),
            "train some": fields(train="some"),
        },
    ),
    **each("model.safetensors", TENSORS | {"flipped": flip(-1)}),
    **each("visible.safetensors", {"flipped": flip(-1), "gone": remove}),
    **each("config.json", {"longer": edit(lambda data: data + b" "), "gone": remove}),
    "a tokenizer added": lambda path: (path / "tokenizer.json").write_text("{}"),
    "a shard added": lambda path: shutil.copy(path / "model.safetensors", path / "model-00002-of-00002.safetensors"),
    "a note added": lambda path: (path / "notes.txt").write_text("hello"),
}


ENDLESS = "proxy.json a device"  # an audit reads it until the memory is full
AUDITED = {what: damage for what, damage in PROXIES.items() if what != ENDLESS}


def reshard(change: Callable[[dict[str, Any]], object]) -> Damage:
    """A model of three files, its index changed."""

    def damage(path: Path) -> None:
        remove(path)
        write_model(path, make_tensors("bert", dtype="BF16"), make_config("bert", "BF16"), shards=3)
        index = path / "model.safetensors.index.json"
        document = json.loads(index.read_text())
        change(document)
        index.write_text(json.dumps(document))

    return damage


def other_tensors(change: Callable[[dict[str, Any]], object]) -> Damage:
    """A model whose tensors are changed."""

    def damage(path: Path) -> None:
        tensors = read_file(path / "model.safetensors")
        change(tensors)
        write_file(path / "model.safetensors", tensors, {"format": "pt"})

    return damage


def nan(tensors: dict[str, Any]) -> None:
    """A weight is no number."""
    tensors[UP][1][3, 4] = 0x7FC1


WORD = "bert.embeddings.word_embeddings.weight"
MODELS: dict[str, Damage] = {
    **each("model.safetensors", TENSORS),
    **each("config.json", {name: MANIFEST[name] for name in ("empty", "gone", "a folder", "no JSON", "a list")}),
    **each(
        "config.json",
        {
            "quantized elsewhere": fields(quantization_config={"quant_method": "gptq"}),
            "architectures missing": fields(architectures=...),
            "model_type a number": fields(model_type=7),
        },
    ),
    "an index without file": reshard(lambda document: document["weight_map"].update({WORD: "model-9.safetensors"})),
    "an index that leaves": reshard(lambda document: document["weight_map"].update({WORD: "../x.safetensors"})),
    "an index with one more": reshard(lambda document: document["weight_map"].update(x=document["weight_map"][WORD])),
    "an index with one less": reshard(lambda document: document["weight_map"].pop(WORD)),
    "an index without map": reshard(lambda document: document.pop("weight_map")),
    "not a number": other_tensors(nan),
    "an unknown tensor": other_tensors(lambda tensors: tensors.update({"bert.mystery": tensors[UP]})),
    "a double": other_tensors(lambda tensors: tensors.update({UP: ("F64", np.ones((48, 32)))})),
    "whole numbers": other_tensors(lambda tensors: tensors.update({UP: ("I64", np.ones((48, 32), np.int64))})),
    "another shape": other_tensors(lambda tensors: tensors.update({UP: ("BF16", tensors[UP][1][:40])})),
    "pickles alone": lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"),
    "two models": lambda path: shutil.copy(path / "config.json", path / "model.safetensors.index.json"),
    "a proxy's manifest": lambda path: shutil.copy("r1/ann/proxy.json", path),
    "a server's manifest": lambda path: shutil.copy("server/fedqsn.json", path),
}
QUERY = "bert.encoder.layer.0.attention.self.query.weight"
NF4 = {"format": "nf4", "block_size": 64, "double_quant": False, "layout": "bnb"}
STATE = f"{QUERY}.quant_state.bitsandbytes__nf4"
PACKED: dict[str, Damage] = {
    **each("fedqsn.json", MANIFEST),
    **each(
        "fedqsn.json",
        {
            "another job": fields(job="f" * 64),
            "another kind": fields(kind="proxy"),
            "a ratio of one": fields(p1=1.0),
            "another plan": fields(plan="0" * 64),
            "other overrides": fields(overrides={"rule": [{"match": "*", "role": "x"}]}),
            "quantization missing": fields(quantization=None),
            "an odd block size": fields(quantization=NF4 | {"block_size": 8}),
            "another format of weights": fields(quantization=NF4 | {"format": "fp4"}),
            "another layout": fields(quantization=NF4 | {"layout": "dense"}),
        },
    ),
    "scales missing": other_tensors(lambda tensors: tensors.pop(f"{QUERY}.absmax")),
    "state missing": other_tensors(lambda tensors: tensors.pop(STATE)),
    "state no JSON": other_tensors(lambda tensors: tensors.update({STATE: ("U8", np.frombuffer(b"{", np.uint8))})),
    "levels of another format": other_tensors(lambda tensors: tensors[f"{QUERY}.quant_map"][1].sort(axis=0)),
    "levels that are none": other_tensors(lambda tensors: tensors[f"{QUERY}.quant_map"][1].fill(0)),
    "a negative scale": other_tensors(lambda tensors: tensors[f"{QUERY}.absmax"][1].fill(0xBF800000)),
    "codes of another length": other_tensors(lambda tensors: tensors.update({QUERY: ("U8", tensors[QUERY][1][:-1])})),
}


# ------------------------------------------------------------------------------------------------ keys, ledgers

KEYS: dict[str, Damage] = MANIFEST | {
    "open to others": lambda path: path.chmod(0o644),
    "a text": become("not a key"),
    "key short": fields(key="abc"),
    "key in capitals": fields(key="A" * 64),
    "p1 missing": fields(p1=...),
    "p1 of one": fields(p1=1),
    "p1 a text": fields(p1="0.25"),
    "p1 true": fields(p1=True),
    "p1 another": fields(p1=0.5),
    "axis unknown": fields(axis="row"),
    "axis another": fields(axis="input"),
    "plan short": fields(plan="abc"),
    "plan another": fields(plan="0" * 64),
    "overrides a list": fields(overrides=[]),
    "overrides unknown": fields(overrides={"rules": []}),
    "groups a list": fields(groups=[]),
    "groups of one number": fields(groups={"a": [1]}),
    "groups negative": fields(groups={"a": [1, -1]}),
    "clear a text": fields(clear="0"),
    "ratios of no group": fields(ratios={"a": 0.5}),
    "too large": lambda path: os.truncate(path, 17 * 2**20),
}


def ledger(change: Callable[[list[bytes]], list[bytes]]) -> Damage:
    """Other lines."""
    return edit(lambda data: b"".join(change(data.splitlines(keepends=True))))


LEDGERS: dict[str, Damage] = FILE | {
    "a line dropped": ledger(lambda lines: lines[1:]),
    "lines swapped": ledger(lambda lines: [lines[1], lines[0], *lines[2:]]),
    "a line twice": ledger(lambda lines: [lines[0], *lines]),
    "a line changed": ledger(lambda lines: [lines[0].replace(b'"p2":0.2', b'"p2":0.1'), *lines[1:]]),
    "an empty line": ledger(lambda lines: [lines[0], b"\n", *lines[1:]]),
    "a line of nothing": ledger(lambda lines: [*lines, b"{}\n"]),
    "a line of null": ledger(lambda lines: [*lines, b"null\n"]),
    "no UTF-8": ledger(lambda lines: [b"\xff\n"]),
    "a doubled field": ledger(lambda lines: [lines[0].replace(b'"round":1', b'"round":1,"round":1'), *lines[1:]]),
    "an unknown field": ledger(lambda lines: [lines[0].replace(b'"round":1', b'"round":1,"more":1'), *lines[1:]]),
    "an invalid client": ledger(lambda lines: [lines[0].replace(b'"ann"', b'"../ann"'), *lines[1:]]),
    "torn": ledger(lambda lines: [lines[0], lines[1][:-9]]),
    "another job's": lambda path: shutil.copy("filled.jsonl", path),
    "another release of the proxy": ledger(lambda lines: [resigned(lines[0])]),
}


def resigned(line: bytes) -> bytes:
    """The only line of a ledger, about another proxy.json."""
    return line.replace(json.loads(line)["proxy_sha256"].encode(), hashlib.sha256(b"another").hexdigest().encode())


# ------------------------------------------------------------------------------------------------ files of people

PLANS: dict[str, str | bytes] = {
    "no TOML": "[[rule]",
    "no UTF-8": b"\xff",
    "an unknown key": "rules = []",
    "a single rule": '[rule]\nmatch = "*"',
    "an invalid rule": "rule = [1]",
    "a rule without match": "[[rule]]\nmasked = false",
    "a rule that sets nothing": '[[rule]]\nmatch = "*"',
    "a rule with more": '[[rule]]\nmatch = "*"\nhidden = true',
    "an unknown role": '[[rule]]\nmatch = "*"\nrole = "matrix"',
    "masked a text": '[[rule]]\nmatch = "*query.weight"\nmasked = "no"',
    "a glob that fits nothing": '[[rule]]\nmatch = "x.*"\nmasked = false',
    "a ratio of one": '[[rule]]\nmatch = "*query.weight"\np1 = 1.0',
    "a ratio that is a text": '[[rule]]\nmatch = "*query.weight"\np1 = "much"',
    "a ratio of nothing": '[[rule]]\nmatch = "*LayerNorm*"\np1 = 0.5',
    "two ratios of a mask": '[[rule]]\nmatch = "*query.weight"\np1 = 0.5',
    "a norm that is hidden": '[[rule]]\nmatch = "*LayerNorm.weight"\nmasked = true',
    "a bias that is quantized": '[[rule]]\nmatch = "*query.bias"\nquantized = true',
    "a matrix that is a conv1d stack": '[[rule]]\nmatch = "*query.weight"\nrole = "expert_stack"',
    "where nowhere": 'where = "output"',
    "where a number": "where = 3",
    "layers that are none": 'layers = "3-1"',
    "layers that the model has not": 'layers = "7"',
    "p1 a number": "p1 = 0.5",
    "p1 twice": '[p1]\n"0" = 0.5\n"embeddings,0" = 0.4',
    "p1 of a layer that is not there": '[p1]\n"3" = 0.5',
    "everything visible": '[[rule]]\nmatch = "*weight"\nmasked = false',
}
WAIVER = '[[waiver]]\nrule = "FQ203"\nreason = "r"\nowner = "o"\n'
POLICIES: dict[str, str | bytes] = {
    "no TOML": "[limits",
    "no UTF-8": b"\xff",
    "an unknown table": "[limit]",
    "an unknown limit": "[limits.proxy]\ncosin = 0.9",
    "a limit out of range": "[limits.proxy]\nexact_share = 5",
    "a limit that is no number": "[limits.proxy]\ncosine = nan",
    "a limit that is true": "[limits.proxy]\ncosine = true",
    "a limit without end": "[limits.proxy]\nrho = inf",
    "a limit of whole models for tensors": "[limits.tensor]\nrho = 0.5",
    "limits a number": "limits = 3",
    "a budget that is a text": '[budget]\nclient = "0.9"',
    "no colluders": "[threat]\ncolluders = 0",
    "half a colluder": "[threat]\ncolluders = 1.5",
    "no examples": "[threat]\npublic_examples = [0]",
    "a scope that is a text": '[scope]\nrequire = "recovery"',
    "an unknown scope": '[scope]\nrequire = ["recovry"]',
    "a regression that is negative": "[regression]\ncosine = -1",
    "a waiver that is no list": "[waiver]",
    "a waiver of a hard rule": WAIVER.replace("FQ203", "FQ001") + "expires = 2999-01-01",
    "a waiver of an incomplete audit": WAIVER.replace("FQ203", "FQ901") + "expires = 2999-01-01",
    "a waiver of no rule": WAIVER.replace("FQ203", "FQ23") + "expires = 2999-01-01",
    "a waiver without date": WAIVER,
    "a waiver with a text for a date": WAIVER + 'expires = "2999-01-01"',
    "a waiver with a time": WAIVER + "expires = 2999-01-01T00:00:00Z",
    "a waiver without reason": WAIVER.replace('reason = "r"\n', "") + "expires = 2999-01-01",
    "a waiver with an empty owner": WAIVER.replace('"o"', '" "') + "expires = 2999-01-01",
    "a waiver with more": WAIVER + "expires = 2999-01-01\nuntil = 1",
}
BASELINES: dict[str, str | bytes] = {
    "no JSON": "{",
    "a list": "[]",
    "without format": "{}",
    "without measures": '{"format": "fedqsn-audit/1"}',
    "with a text for a measure": '{"format": "fedqsn-audit/1", "measures": {"proxy cosine": "y"}}',
    "with other measures": '{"format": "fedqsn-audit/1", "measures": {"something": 1.0}}',
}
DATA: dict[str, str | bytes] = {
    "a.jsonl": "",
    "b.jsonl": "\n\n",
    "c.jsonl": "{",
    "d.jsonl": '{"text": "a"}\n[1]',
    "e.jsonl": '{"text": "a", "text": "b"}',
    "f.jsonl": b"\xff",
    "g.csv": "text,text\na,b\n",
    "h.csv": "text,label\na\n",
    "i.csv": "text,label\n",
    "j.parquet": "no parquet",
    "k.txt": "a text",
}


def written(name: str, texts: dict[str, str | bytes], commands: Sequence[str]) -> Files:
    """What commands say about each text in the file `spoilt`."""
    return damaged(name, "nothing", {what: become(text) for what, text in texts.items()}, commands)


def data() -> Files:
    """What `evaluate` says about each data file, before it looks at the model."""
    desk = Desk()
    for name, text in DATA.items():
        become(text)(Path(name))
    commands = [f"evaluate global --data {name}" for name in (*DATA, "server", "nowhere.jsonl")]
    return {"errors/data.json": {f"fedqsn {line}": desk.outcome(line) for line in commands}}


# ------------------------------------------------------------------------------------------------ functions

Options = dict[str, Any]
OWNER: Options = {"key": "job.key", "ledger": "ledger.jsonl"}
CALLS: list[tuple[str, tuple[Any, ...], Options, list[Options]]] = [
    (
        "mask",
        ("global", "out"),
        {"key": "job.key"},
        [
            {"p1": "much"},
            {"axis": "row"},
            {"where": "output"},
            {"layers": "x"},
            {"p1_schedule": "0"},
            {"preset": "weak"},
            {"fill": "ones"},
            {"schedule": "never"},
            {"client": "a b"},
            {"max_shard_size": "big"},
        ],
    ),
    (
        "quantize",
        ("server", "out"),
        {},
        [
            {"format": "nf5"},
            {"format": "nf4", "block_size": 16},
            {"format": "nf4", "layout": "gguf"},
            {"format": "nf4", "max_shard_size": "-1GB"},
        ],
    ),
    (
        "export_proxy",
        ("server", "out"),
        OWNER | {"client": ["eve"], "round": 3, "p2": 0.1},
        [
            {"client": ()},
            {"client": ["eve", "dan"]},
            {"client": ["eve", "eve"]},
            {"round": -1},
            {"p2": 1.0},
            {"format": "nf5"},
            {"block_size": 63},
            {"layout": "gguf"},
            {"schedule": "never"},
            {"train": "some"},
            {"budget": 2.0},
            {"coalition": 2},
            {"budget": 1.0, "coalition": 0},
            {"preset": "weak"},
        ],
    ),
    (
        "merge",
        ("global", ["u-ann"], "out"),
        OWNER,
        [
            {"normalize": "median"},
            {"server_lr": 0.0},
            {"server_lr": "fast"},
            {"blend": 0.5},
            {"control_weight": 2.0},
            {"max_update_norm": float("nan")},
            {"max_shard_size": "0GB"},
            {"ledger": None},
            {"public_base": "base"},
            {"allow_worse": True},
            {"max_examples": 0},
        ],
    ),
    ("merge", ("global", [], "out"), OWNER, [{}, {"restore": "server", "blend": 1.5}]),
    (
        "client_train",
        ("r1/ann", "out"),
        {"data": "data.jsonl"},
        [
            {"epochs": 0},
            {"lr": -1.0},
            {"batch_size": 0},
            {"max_length": 0},
            {"seed": -1},
            {"precision": "fp64"},
            {"update_format": "fp8"},
            {"max_steps": 0},
            {"warmup_ratio": 2.0},
            {"device": "tpu"},
            {"device": "cuda:99"},
        ],
    ),
    ("evaluate", ("global",), {"data": "data.jsonl"}, [{"batch_size": 0}, {"max_length": 0}, {"device": "tpu"}]),
    ("inspect", ("global",), {}, [{"axis": "row"}, {"overrides": "nowhere.toml"}]),
    ("audit", (), {}, [{}, {"key": "job.key"}, {"proxies": (), "ledger": "ledger.jsonl"}]),
]


def functions() -> Files:
    """What the functions refuse, much of which no command line can ask for."""
    desk = Desk()
    records: Records = {}
    for name, arguments, usual, wrong in CALLS:
        for options in wrong:
            shown = ", ".join([*map(repr, arguments), *(f"{key}={value!r}" for key, value in options.items())])
            call = partial(getattr(fedqsn_cli, name), *arguments, **usual | options)
            records[f"{name}({shown})"] = desk.refused(call)
    return {"errors/functions.json": records}


# ------------------------------------------------------------------------------------------------ jobs


def jobs() -> dict[str, Job]:
    """The jobs of this section."""
    exposure = "audit --key job.key --ledger ledger.jsonl --quiet"
    return {
        "options": partial(lines, "options", WRONG_OPTIONS),
        "places": partial(lines, "places", WRONG_PLACES),
        "updates": partial(damaged, "updates", "u-ann", UPDATES, [f"merge global spoilt u-bob {JOB}"]),
        "updates inspected": partial(damaged, "updates-inspected", "u-ann", UPDATES, ["inspect spoilt -q"]),
        "proxies": partial(
            damaged,
            "proxies",
            "r1/ann",
            PROXIES,
            [
                "client-train spoilt --out out --data data.jsonl",
                "inspect spoilt -q",
            ],
        ),
        "proxies audited": partial(
            damaged,
            "proxies-audited",
            "r1/ann",
            AUDITED,
            [
                "audit spoilt --truth global --key job.key --ledger ledger.jsonl -q",
            ],
        ),
        "models": partial(
            damaged,
            "models",
            "global",
            MODELS,
            [
                "mask spoilt --out out --key job.key -q",
                "inspect spoilt -q",
                "merge spoilt u-ann -q " + JOB,
            ],
        ),
        "packed": partial(
            damaged,
            "packed",
            "packed",
            PACKED,
            [
                f"export-proxy spoilt --out out {EVE} --ledger ledger.jsonl -q",
                "inspect spoilt -q",
            ],
        ),
        "keys": partial(
            damaged,
            "keys",
            "job.key",
            KEYS,
            [
                "mask global --out out --key spoilt -q",
                "inspect spoilt -q",
            ],
        ),
        "ledgers": partial(
            damaged,
            "ledgers",
            "ledger.jsonl",
            LEDGERS,
            [
                "merge global u-ann --out out --key job.key --ledger spoilt -q",
                "inspect spoilt -q",
                "audit --key job.key --ledger spoilt -q",
            ],
        ),
        "plans": partial(
            written,
            "plans",
            PLANS,
            [
                "inspect global --plan --overrides spoilt -q",
                "mask global --out out --key new.key --p1 0 --plan spoilt -q",
            ],
        ),
        "policies": partial(written, "policies", POLICIES, [f"{exposure} --policy spoilt"]),
        "baselines": partial(written, "baselines", BASELINES, [f"{exposure} --baseline spoilt"]),
        "data": data,
        "functions": functions,
    }
