"""Section reports: whole audits, at least one of every verdict, in every format that the audit has."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedqsn_cli import merge
from golden.inputs import draft, make_config, make_model, noise, visible_elements
from golden.running import (
    OTHER_SECRET,
    SECRET,
    Files,
    Job,
    Outcome,
    Records,
    export_proxy,
    fedqsn,
    fixed_key,
    mask,
    sha256,
    steady,
    succeed,
)
from support.raw_safetensors import read_file, read_model, to_bits, to_floats, write_file, write_model

KEY, LEDGER = Path("job.key"), Path("ledger.jsonl")
JOB: dict[str, Any] = {"key": KEY, "ledger": LEDGER}
OWNER = ("--truth", "global", "--key", KEY, "--ledger", LEDGER)
ENDINGS = {"text": "txt", "json": "json", "sarif": "sarif", "junit": "xml", "github": "log", "markdown": "md"}
FULL = ("passed", "over", "broken", "incomplete", "crowd")  # in all formats; others are looked at by their numbers
LONG = ("sarif", "html")  # as texts of VERBATIM audits only, as digests of the others
VERBATIM = ("over", "broken")
QUERY, NORM = "bert.encoder.layer.0.attention.self.query.weight", "bert.embeddings.LayerNorm.weight"

WIDE = """\
[scope]
require = ["invariants", "merge", "exposure", "recovery", "regression", "FQ204"]
[threat]
colluders = 2
rounds = 2
[limits.proxy]
cosine = 0.99999
log10_nmse = -15.0
exact_share = 0.9
[limits.coalition]
delta_recovered = 0.99999
[limits.clear]
share = 0.5
[budget]
client = 0.99
coalition = 0.999
[regression]
cosine = 0.01
log10_nmse = 0.1
"""
NARROW = """\
[threat]
colluders = 2
rounds = 3
[limits.proxy]
cosine = 0.1
exact_share = 0.0
delta_recovered = 0.2
[limits.coalition]
log10_nmse = -0.05
[limits.tensor]
cosine = 0.9962
log10_nmse = -2.25
[limits.clear]
share = 0.001
[budget]
client = 0.3
coalition = 0.4
[regression]
exposure = 0.5
[[waiver]]
rule = "FQ203"
tensor = "*embeddings*"
reason = "the vocabulary is public"
owner = "owner@example.com"
expires = 2999-12-31
[[waiver]]
rule = "FQ202"
tensor = "no.such.tensor"
scope = "proxy alice"
reason = "never needed"
owner = "owner@example.com"
expires = 2999-12-31
"""
EXPIRED = """\
[scope]
require = ["invariants", "merge", "exposure", "recovery", "function", "regression"]
[budget]
client = 0.1
[[waiver]]
rule = "FQ101"
reason = "accepted for the pilot"
owner = "owner@example.com"
expires = 2020-02-29
"""
CROWDED = """\
[threat]
colluders = 4
rounds = 12
[budget]
client = 0.9
coalition = 0.95
"""


# ------------------------------------------------------------------------------------------------ jobs


def export_job(family: str = "bert", dtype: str = "F32", **options: Any) -> None:
    """A public base, a model fine-tuned from it, and a key."""
    base = read_model(make_model(Path("base"), family, dtype=dtype, hidden=64, inner=128))
    tuned = base | {
        name: (dtype, to_bits(to_floats(base[name][1], dtype) + noise(5, 0.02)(name, shape), dtype))
        for name, shape in float_shapes("base").items()
    }
    write_model(Path("global"), tuned, make_config(family, dtype))
    fixed_key(SECRET, lambda: mask("global", "scratch", key=KEY, **options))


def float_shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the float tensors of a model."""
    tensors = read_model(Path(model))
    return {name: bits.shape for name, (dtype, bits) in tensors.items() if dtype in ("F32", "F16", "BF16")}


def release(source: str, round: int, *clients: str, **options: Any) -> list[Path]:
    """Proxies of a round."""
    export_proxy(source, f"r{round}/{{client}}", client=clients, round=round, **{"p2": 0.25} | JOB | options)
    return [Path(f"r{round}", client) for client in clients]


def send(proxies: Sequence[Path]) -> list[Path]:
    """An update for each proxy."""
    shapes = float_shapes("global")
    return [draft(proxy, shapes, noise(number)).write(Path(f"u-{proxy.name}")) for number, proxy in enumerate(proxies)]


def two_rounds() -> None:
    """A job of two clients and two rounds, and the model after the first of them."""
    export_job(p1=0.25)
    first = release("global", 1, "alice", "bob")
    release("global", 2, "alice", "bob")
    merge("global", send(first), "next", **JOB)


def policy(text: str) -> tuple[str, Path]:
    """The option that gives a policy."""
    path = Path("policy.toml")
    path.write_text(text)
    return "--policy", path


def baseline(change: float, *words: str | Path) -> tuple[str, Path]:
    """The option that gives a baseline: what this audit measures, each changed by so much."""
    path = Path("baseline.json")
    fedqsn("audit", *words, "--format", "json", "--output", path, "-q")
    measured = json.loads(path.read_text())
    measures = {name: round(value + change, 3) for name, value in measured["measures"].items()}
    path.write_text(json.dumps({"format": measured["format"], "measures": measures}))
    return "--baseline", path


# ------------------------------------------------------------------------------------------------ leaks


def leak() -> None:
    """Two proxies that show what they must not, signed by somebody who could."""
    export_job(p1=0.25)
    release("global", 1, "alice", "bob")
    release("global", 0, "everything", p2=0.0, ledger="other.jsonl")
    hidden = np.flatnonzero(~visible_elements(Path("r0/everything"))[QUERY][0].any(axis=1))
    row = read_model(Path("global"))[QUERY][1][hidden[0]]

    config = Path("r1/alice/config.json")
    config.write_text(config.read_text().replace("{", f'{{"notes": "{SECRET}", "seed": 7,', 1))
    change("alice", lambda tensors: tensors.update({NORM: ("F32", row)}))
    change("bob", lambda tensors: tensors.update({"bert.extra.weight": ("F32", row[None])}))
    change("bob", lambda tensors: grow(tensors[f"{QUERY}.absmax"][1]))
    Path("r1/bob/notes.txt").write_text("made from /home/owner/models/secret")


def grow(bits: Any) -> None:
    """Make floats larger, where they are."""
    bits.view(np.float32)[:] *= 1.5


def change(client: str, how: Callable[[dict[str, Any]], object]) -> None:
    """Change the tensors of a proxy, and sign it anew: in proxy.json and, down the whole chain, in the ledger."""
    folder = Path("r1", client)
    tensors = read_file(folder / "model.safetensors")
    how(tensors)
    write_file(folder / "model.safetensors", tensors, {"format": "pt"})
    text = (folder / "proxy.json").read_text()
    released = sha256(folder / "proxy.json")
    for name, digest in json.loads(text)["files"].items():
        text = text.replace(digest, sha256(folder / name))
    (folder / "proxy.json").write_text(text)
    lines, previous = [], "0" * 64
    for line in LEDGER.read_text().replace(released, sha256(folder / "proxy.json")).splitlines():
        lines.append(line.replace(json.loads(line)["previous"], previous))
        previous = hashlib.sha256(lines[-1].encode()).hexdigest()
    LEDGER.write_text("".join(f"{line}\n" for line in lines))


# ------------------------------------------------------------------------------------------------ audits


Words = list[str | Path]


def passed() -> Words:
    """Everything is given, and nothing is over a limit."""
    two_rounds()
    words: Words = ["r1/alice", "r1/bob", *OWNER, "--base", "base", "--after", "next"]
    return [*words, *policy(WIDE), *baseline(0.0005, *words)]


def over() -> Words:
    """Over many limits, and worse than before; one waiver helps, another one is not needed."""
    two_rounds()
    words: Words = ["r1/alice", "r1/bob", *OWNER, "--base", "base"]
    return [*words, *policy(NARROW), *baseline(-0.05, *words)]


def broken() -> Words:
    """Hard invariants do not hold, and the key is another job's for one more proxy."""
    leak()
    fixed_key(OTHER_SECRET, lambda: mask("global", "scratch", key="other.key", p1=0.25))
    export_proxy("global", "r1/eve", client="eve", round=1, key="other.key", ledger="eve.jsonl", p2=0.1, format="nf3")
    return [*(f"r1/{name}" for name in ("alice", "bob", "eve")), *OWNER]


def blind() -> Words:
    """The same leaks, looked at without anything of the owner's."""
    leak()
    return ["r1/alice", "r1/bob"]


def incomplete() -> Words:
    """A proxy and inputs are missing, a waiver has expired."""
    two_rounds()
    return ["r1/alice", "r1/bob", "r1/nobody", *OWNER[2:], *policy(EXPIRED)]


def unreadable() -> Words:
    """What should be a proxy cannot be read as one."""
    two_rounds()
    Path("r1/bob/proxy.json").write_text("{")
    return ["r1/alice", "r1/bob", *OWNER, *policy(WIDE)]


def crowd() -> Words:
    """What many clients have seen, fresh and sticky, over many rounds: from ledger and key alone."""
    export_job(p1=0.1)
    for round in range(1, 4):
        release("global", round, *(f"fresh-{number:02}" for number in range(round * 5)))
        release("global", round + 10, *(f"sticky-{number}" for number in range(4)), schedule="sticky", p2=0.4)
    return ["--key", KEY, "--ledger", LEDGER, *policy(CROWDED)]


def rounds() -> Words:
    """Many proxies of single weights, in bf16 and int8, with another ratio in one layer."""
    export_job("llama", "BF16", p1=0.2, axis="element", p1_schedule="0=0.5")
    proxies = release("global", 1, *(f"client{number}" for number in range(6)), p2=0.5, format="int8")
    release("global", 2, "client1", "client5", schedule="sticky", p2=0.5, format="int8")
    return [*proxies, *OWNER]


def experts() -> Words:
    """A mixture of experts whose outputs alone are hidden."""
    export_job("gpt_oss", "F16", p1=0.4, axis="input", where="mlp")
    return [*release("global", 1, "alice", "bob", format="nf2"), *OWNER, "--base", "base"]


def trained() -> Words:
    """A later round of a job whose clients train what stands in the holes."""
    filled: dict[str, Any] = {"fill": "base", "public_base": "base"}
    export_job(p1=0.5, **filled)
    mask("global", "server", key=KEY, **filled)
    merge("server", send(release("server", 1, "alice", "bob", train="all", **filled)), "server-1", **JOB)
    proxies = release("server-1", 2, "alice", "bob", train="all", **filled)
    return [*proxies, *OWNER, "--base", "base", "--server", "server-1"]


AUDITS: dict[str, Callable[[], Words]] = {
    one.__name__: one for one in (passed, over, broken, blind, incomplete, unreadable, crowd, rounds, experts, trained)
}


def report(name: str) -> Files:
    """One audit in all formats, printed; and as files, which are compared with what is printed."""
    words = ["audit", *AUDITS[name]()]
    files: Files = {}
    records: Records = {"quiet": brief(fedqsn(*words, "--quiet"))}
    for form in ENDINGS if name in FULL else ["text", "json"]:
        printed = fedqsn(*words, "--format", form)
        files[f"reports/{name}.{ENDINGS[form]}"] = printed.out
        records[form] = brief(replace(printed, out=""))
    for form in ENDINGS if name == "passed" else ["json"]:
        beside = fedqsn(*words, "--format", form, "--output", "made", "--report", "page.html")
        records[f"beside {form}"] = "the text" if beside.out == files[f"reports/{name}.txt"] else brief(beside)
        same = steady(Path("made").read_text()) == files[f"reports/{name}.{ENDINGS[form]}"]
        records[f"{form} in a file"] = "the same" if same else "another"
    files[f"reports/{name}.html"] = steady(Path("page.html").read_text())
    for path in [path for path in files if path.endswith(LONG) and name not in VERBATIM]:
        records[f"digest of {Path(path).suffix}"] = hashlib.sha256(str(files.pop(path)).encode()).hexdigest()
    return files | {"reports/endings.json": {f"{name}: {what}": made for what, made in records.items()}}


def brief(outcome: Outcome) -> str:
    """An outcome in one line."""
    return f"[{outcome.code}] {outcome.out}{outcome.err}".strip()


def template() -> Files:
    """The policy that `--init-policy` writes."""
    printed = succeed("audit", "--init-policy").out
    return {"reports/policy.toml": Path("policy.toml").read_text(), "reports/init-policy.txt": printed}


def jobs() -> dict[str, Job]:
    """The jobs of this section."""
    return {"template": template, **{name: partial(report, name) for name in AUDITS}}
