"""Section merges: digests of merged, controlled and restored models, their residuals among them, over two rounds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedqsn_cli import merge
from golden.inputs import draft, make_model, noise
from golden.running import SECRET, Files, Job, Records, digests, drawing, export_proxy, mask
from support.raw_safetensors import read_model

KEY, LEDGER = Path("job.key"), Path("ledger.jsonl")
JOB: dict[str, Any] = {"key": KEY, "ledger": LEDGER}
EXAMPLES = {"ann": 30, "bob": 7, "own": 12}
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Case:
    """A job, and how its clients send updates. `base` fills holes; `trains` lets clients train what stands there."""

    family: str
    dtype: str = "F32"
    axis: str = "neuron"
    format: str = "nf4"
    precision: str = "fp32"
    base: bool = False
    trains: bool = False
    rescale: bool | None = None
    shards: int = 1
    p2: float = 0.2

    @property
    def name(self) -> str:
        """In file names."""
        more = [word for word, given in (("base", self.base), ("trained", self.trains)) if given]
        return "-".join([self.family, self.dtype, self.axis, self.format, self.precision, *more])

    @property
    def filling(self) -> dict[str, Any]:
        """Options about what stands in the holes."""
        return {"fill": "base", "public_base": "base"} if self.base else {}


CASES = (
    Case("bert"),
    Case("bert", "BF16", "input", "none", "bf16"),
    Case("gpt2", "F16", "neuron", "int8", "fp16", shards=3),
    Case("gpt2", "F32", "element", "nf3", "bf16", base=True),
    Case("llama", "BF16", "neuron", "fp4", "fp32", rescale=False),
    Case("llama-tied", "F32", "input", "nf2", "fp16"),
    Case("qwen2", "F16", "element", "nf4", "fp32", p2=0.0),
    Case("t5", "BF16", "input", "nf4", "fp16", base=True),
    Case("mixtral", "F32", "neuron", "int8", "bf16", shards=3),
    Case("gpt_oss", "BF16", "neuron", "nf4", "fp32"),
    Case("gpt_oss", "F32", "element", "none", "fp32"),
    Case("bert", "F32", "neuron", "nf4", "fp32", base=True, trains=True),
    Case("llama", "BF16", "element", "nf3", "bf16", base=True, trains=True),
    Case("gpt2", "F16", "input", "fp4", "fp32", base=True, trains=True, shards=3),
)


def play(case: Case) -> Files:
    """Two rounds, merged in every way, and the end of the job."""
    sizes: dict[str, Any] = {"dtype": case.dtype, "hidden": 33, "shards": case.shards}
    make_model(Path("model"), case.family, **sizes)
    make_model(Path("base"), case.family, seed=1, **sizes)
    options: dict[str, Any] = {"p1": 0.3, "axis": case.axis, "rescale": case.rescale, **case.filling}
    with drawing(SECRET):
        mask("model", "server", key=KEY, **options)
    records = served(case) | ({} if case.trains else owned(case))
    return {f"merges/{case.name}.json": records | digests(LEDGER)}


def owned(case: Case) -> Records:
    """Merges into the global model. The clients are those of the server model: both give the same proxies."""
    sent = [Path(f"server-round-1/u-{name}") for name in ("ann", "bob")]
    own = send(case, release(case, "model", "own-round-1", 1, ("own",), p2=0.0), 3)
    ways: dict[str, dict[str, Any]] = {
        "coverage": {},
        "clients": {"normalize": "clients"},
        "large step": {"server_lr": 2.0},
        "small step": {"server_lr": 0.25, "normalize": "clients", "max_shard_size": "9KB"},
        "control": {"control": own[0]},
        "weak control": {"control": own[0], "control_weight": 0.7, "normalize": "clients"},
    }
    records: Records = {}
    for name, way in ways.items():
        made = merge("model", sent, f"global {name}", **JOB, **way)
        records |= {f"global {name}: trained": f"{made.covered:.6g}"} | digests(f"global {name}")
    merge("model", sent[1:], "global bob alone", **JOB)
    later = send(case, release(case, "global coverage", "global-round-2", 2), 5)
    merge("global coverage", later, "global 2", **JOB)
    return records | digests("global bob alone", "global 2", "global-round-2/ann")


def served(case: Case) -> Records:
    """Merges into the server model, and what `restore` makes of it."""
    server = "server"
    for round in (1, 2):
        sent = send(case, release(case, server, f"server-round-{round}", round), round)
        merge(server, sent, f"server by clients {round}", normalize="clients", server_lr=0.5, **JOB)
        merge(server, sent, f"server {round}", **JOB)
        server = f"server {round}"
    base: dict[str, Any] = {"public_base": "base"} if case.trains else {}
    for blend in (1.0, 0.5, 0.0):
        merge("model", [], f"restored {blend}", key=KEY, restore=server, blend=blend, **base)
    made = sorted(str(path) for path in Path().iterdir() if path.name.startswith(("server ", "restored ")))
    return digests("server-round-2/ann", *made)


def release(
    case: Case, source: str, folder: str, round: int, clients: tuple[str, ...] = ("ann", "bob"), **options: Any
) -> dict[str, Path]:
    """Proxies of a round, by client."""
    train = {"train": "all"} if case.trains else {}
    usual: dict[str, Any] = {"p2": case.p2, "rescale": case.rescale, "format": case.format, **case.filling, **train}
    export_proxy(source, f"{folder}/{{client}}", client=clients, round=round, **JOB, **usual | options)
    return {client: Path(folder, client) for client in clients}


def send(case: Case, proxies: dict[str, Path], seed: int) -> list[Path]:
    """An update of each client."""
    shapes = {name: bits.shape for name, (dtype, bits) in read_model(Path("model")).items() if dtype in FLOATS}
    return [
        draft(proxy, shapes, noise(10 * seed + number), examples=EXAMPLES[client], precision=case.precision).write(
            proxy.parent / f"u-{client}"
        )
        for number, (client, proxy) in enumerate(proxies.items())
    ]


def jobs() -> dict[str, Job]:
    """The jobs of this section."""
    return {case.name: partial(play, case) for case in CASES}
