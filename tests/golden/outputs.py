"""Section outputs: digests of all files of models, proxies, ledgers and keys, over all that decides their bytes.

The grid plays one job for every family and format; its other factors follow Latin squares, so that every two values of
any two of them that matter meet somewhere. What is not a matter of combinations has jobs of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedqsn_cli import quantize
from golden.inputs import SHAPES, make_config, make_model, make_tensors
from golden.running import SECRET, Files, Job, Records, attempt, digests, drawing, export_proxy, fixed_key, mask, sha256
from support.raw_safetensors import Tensors, to_bits, to_floats, write_model

FORMATS = ("nf4", "fp4", "int8", "nf3", "nf2", "none")
AXES = ("neuron", "input", "element")
FILLS = ("zero", "base", "trained")  # trained: clients train the public base in the holes, too
DTYPES = ("F32", "F16", "BF16")
KEY, LEDGER = Path("job.key"), Path("ledger.jsonl")


# ------------------------------------------------------------------------------------------------ the grid


@dataclass(frozen=True)
class Case:
    """The options of one job."""

    family: str
    format: str
    axis: str
    fill: str
    dtype: str
    layout: str | None
    block_size: int
    double_quant: bool
    schedule: str
    rescale: bool | None
    p1: float
    p2: float
    hidden: int
    inner: int
    shards: int

    @property
    def masking(self) -> dict[str, Any]:
        """Options of `mask` and `export_proxy`."""
        base = {"fill": "base", "public_base": "base"} if self.fill != "zero" else {}
        return {"p1": self.p1, "axis": self.axis, "rescale": self.rescale, **base}

    @property
    def packing(self) -> dict[str, Any]:
        """Options of `quantize` and `export_proxy`."""
        return {
            "format": self.format,
            "layout": self.layout,
            "block_size": self.block_size,
            "double_quant": self.double_quant,
        }

    @property
    def releasing(self) -> dict[str, Any]:
        """Options of `export_proxy`."""
        train = {"train": "all"} if self.fill == "trained" else {}
        return {"client": ("ann", "bob"), "p2": self.p2, "schedule": self.schedule, "ledger": LEDGER, **train}

    @property
    def limit(self) -> str:
        """Largest file of an output; small where the source has several, too."""
        return "5GB" if self.shards == 1 else "9KB"

    def __str__(self) -> str:
        fields = vars(self).items()
        return " ".join(f"{name}={value}" for name, value in fields if name not in ("family", "format"))


def case(family: int, format: int) -> Case:
    """The job of a family and a format."""
    i, j = family, format
    name, fill = FORMATS[j], FILLS[(i + 2 * j) % 3]
    packable = name in ("nf4", "fp4", "int8")
    layout = (None, "dense", "bnb")[(i + j) % 3 if j % 2 else (i // 2 + j) % 3] if packable else None
    return Case(
        family=list(SHAPES)[i],
        format=name,
        axis=AXES[(i + j) % 3],
        fill=fill,
        dtype=DTYPES[(i // 3 + j) % 3],
        layout=layout,
        block_size=(64, 32, 256, 128)[(i + 2 * (i // 3) + j) % 4],
        double_quant=name in ("nf4", "fp4") and layout != "dense" and fill == "zero" and i < 6,
        schedule=("fresh", "sticky")[(i // 2 + j // 2) % 2],
        rescale=(None, None, False, True)[(3 * i + j) % 4],
        p1=(0.25, 0.5, 0.1, 0.9)[(i + j // 2) % 4],
        p2=(0.2, 0.0, 0.5)[(i + j) // 2 % 3],
        hidden=(32, 33, 47, 64)[(i + j // 3) % 4],
        inner=(48, 51, 128)[(i // 2 + j) % 3],
        shards=(1, 3)[(i + j // 3) % 2],
    )


def grid() -> Iterator[Case]:
    """All jobs of the grid."""
    for family in range(len(SHAPES)):
        for format in range(len(FORMATS)):
            yield case(family, format)


def play(case: Case) -> Files:
    """Every step of a job: key, server model, quantized model, two rounds of proxies, one proxy made by hand."""
    sizes: dict[str, Any] = {"dtype": case.dtype, "hidden": case.hidden, "inner": case.inner, "shards": case.shards}
    make_model(Path("model"), case.family, **sizes)
    make_model(Path("base"), case.family, seed=1, **sizes)
    source: dict[str, Any] = {"key": KEY, "max_shard_size": case.limit}
    with drawing(SECRET):
        mask("model", "server", **source, **case.masking)
    quantize("server", "packed", max_shard_size=case.limit, **case.packing)
    export_proxy("model", "round-1/{client}", round=1, **source, **case.masking, **case.packing, **case.releasing)
    export_proxy("packed", "round-2/{client}", round=2, **source, **case.masking, **case.releasing)
    client: dict[str, Any] = {"client": "bob", "round": 1, "p2": case.p2, "schedule": case.schedule}
    mask("packed", "by-hand", **source, **case.masking, **client)
    made = digests(KEY, "server", "packed", "round-1", "round-2", "by-hand", LEDGER)
    records = {"options": str(case)} | made
    return {f"outputs/{case.family}.json": {f"{case.format} {what}": value for what, value in records.items()}}


# ------------------------------------------------------------------------------------------------ what is hidden

HIDINGS: dict[str, dict[str, Any]] = {
    "where outputs": {"where": "outputs"},
    "where mlp": {"where": "mlp"},
    "where attention": {"where": "attention"},
    "layers 0": {"layers": "0"},
    "layers embeddings": {"layers": "embeddings"},
    "layers head": {"layers": "head"},
    "p1 schedule": {"p1_schedule": "0=0.8"},
    "p1 schedule of embeddings": {"p1_schedule": "embeddings=0.05", "layers": "embeddings,0"},
    "nothing": {"p1": 0.0},
    "preset paper": {"preset": "paper", "p1": 0.3},
    "preset paper with fill base": {"preset": "paper", "fill": "base", "public_base": "base"},
    "preset strong": {"preset": "strong", "p1": None, "public_base": "base"},
    "preset strong, fresh, where mlp": {"preset": "strong", "where": "mlp", "public_base": "base"},
}
SCHEDULED = {"preset strong, fresh, where mlp": {"schedule": "fresh", "train": "visible"}}


def hiding(family: str) -> Files:
    """A family with each way to say what is hidden: options, presets and plan files."""
    make_model(Path("model"), family)
    make_model(Path("base"), family, seed=1)
    write_plans(family)
    plans: dict[str, dict[str, Any]] = {f"plan {path.stem}": {"plan": path} for path in sorted(Path().glob("*.toml"))}
    records: Records = {}
    for number, (name, options) in enumerate((HIDINGS | plans).items()):
        given, releasing = {"p1": 0.4} | options, SCHEDULED.get(name, {})
        records |= attempt(name, partial(hidden, f"{number:02}", given, releasing))
    return {f"outputs/hiding-{family}.json": records}


def hidden(place: str, options: dict[str, Any], releasing: dict[str, Any]) -> Records:
    """A server model and a proxy."""
    key = Path(f"{place}.key")
    with drawing(SECRET):
        mask("model", f"{place}/server", key=key, **options)
    export_proxy(
        "model",
        f"{place}/proxy",
        client="ann",
        round=1,
        key=key,
        ledger=f"{place}/ledger.jsonl",
        p2=0.2,
        **options,
        **releasing,
    )
    return {what.removeprefix(f"{place}/"): digest for what, digest in digests(key, place).items()}


def write_plans(family: str) -> None:
    """Plan files with one rule of each kind, and one with several."""
    names = [name for name, shape in SHAPES[family][0](32, 48, 41).items() if len(shape) > 1]
    first, middle, last = names[0], names[len(names) // 2], names[-1]
    rules = {
        "visible": f'[[rule]]\nmatch = "{first}"\nmasked = false\n',
        "visible and dense": f'[[rule]]\nmatch = "{middle}"\nmasked = false\nquantized = false\n',
        "dense": f'[[rule]]\nmatch = "{last}"\nquantized = false\n',
        "ratio": f'[[rule]]\nmatch = "{last}"\np1 = 0.9\n',
        "role": f'[[rule]]\nmatch = "{last}"\nrole = "linear"\n',
        "biases": '[[rule]]\nmatch = "*bias"\nmasked = false\n',
        "all": f"""\
where = "mlp"
layers = "0"
[p1]
"0" = 0.6
[[rule]]
match = "{middle}"
masked = true
p1 = 0.2
[[rule]]
match = "{middle}"
quantized = false
p1 = 0.3
""",
    }
    for name, text in rules.items():
        Path(f"{name}.toml").write_text(text)


# ------------------------------------------------------------------------------------------------ public bases


def bases() -> Files:
    """Public bases that are not quite like the model."""
    records: Records = {}
    for name, (family, dtype, base, config) in other_bases().items():
        folder = Path(name.replace(" ", "-"))
        make_model(folder / "model", family, dtype=dtype)
        write_model(folder / "base", base, config)
        options: dict[str, Any] = {"p1": 0.5, "fill": "base", "public_base": str(folder / "base")}
        model, key = str(folder / "model"), folder / KEY
        server, proxy = folder / "server", folder / "proxy"
        with drawing(SECRET):
            made = mask(model, server, key=key, **options)
        export_proxy(
            model, proxy, client="ann", round=1, key=key, ledger=folder / LEDGER, p2=0.2, train="all", **options
        )
        records[f"{folder}: matches"] = json.dumps(made.public_base)
        records |= digests(server, proxy, folder / LEDGER)
    return {"outputs/bases.json": records}


def other_bases() -> dict[str, tuple[str, str, Tensors, dict[str, Any]]]:
    """Name -> the model's family and dtype, the base's tensors and config."""
    bert, llama = (partial(make_tensors, family, seed=1) for family in ("bert", "llama"))
    of_bert, of_llama = make_config("bert"), make_config("llama")
    labels = bert() | {"classifier.weight": ("F32", bert()["classifier.weight"][1][:3])}
    return {
        "without prefix": ("bert", "F32", {name.removeprefix("bert."): one for name, one in bert().items()}, of_bert),
        "with prefix": ("llama", "F32", {f"language_model.{name}": one for name, one in llama().items()}, of_llama),
        "longer vocabulary": ("bert", "F16", bert(dtype="F16", vocabulary=50), of_bert),
        "shorter vocabulary": ("llama", "F32", llama(vocabulary=29), of_llama),
        "without head": ("bert", "BF16", without(bert(dtype="BF16"), "classifier"), of_bert),
        "other labels": ("bert", "F32", labels, of_bert),
        "wider dtype": ("llama", "BF16", llama(dtype="F32"), of_llama),
        "narrower dtype": ("llama", "F32", llama(dtype="F16"), of_llama),
        "tied": ("llama", "F32", without(make_tensors("llama-tied", seed=1), "lm_head"), make_config("llama-tied")),
        "untied": ("llama-tied", "F16", llama(dtype="F16"), of_llama),
    }


def without(tensors: Tensors, start: str) -> Tensors:
    """The tensors whose names do not start like this."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(start)}


# ------------------------------------------------------------------------------------------------ formats, sizes

PACKINGS: list[dict[str, Any]] = [
    *({"format": format, "block_size": size} for format in FORMATS for size in (32, 64, 512, 4096)),
    *({"format": format, "block_size": size, "double_quant": True} for format in FORMATS[:2] for size in (64, 128)),
    *({"format": format, "block_size": size, "layout": "dense"} for format in FORMATS[:3] for size in (32, 1024)),
]


def formats(family: str, dtype: str) -> Files:
    """A global model in every number format, and with a plan file."""
    make_model(Path("model"), family, dtype=dtype, hidden=64, inner=144)
    for number, packing in enumerate(PACKINGS):
        quantize("model", f"{number:02} {' '.join(map(str, packing.values()))}", **packing)
    glob = "*c_proj.weight" if family == "gpt2" else "*embed*"
    Path("plan.toml").write_text(f'[[rule]]\nmatch = "{glob}"\nquantized = false\n')
    quantize("model", "with a plan", format="nf4", plan="plan.toml", max_shard_size="20KB")
    made = sorted(str(path) for path in Path().iterdir() if (path / "fedqsn.json").exists())
    return {f"outputs/formats-{family}-{dtype}.json": digests(*made)}


def large(family: str, dtype: str, format: str, axis: str, inner: int = 36_000) -> Files:
    """Tensors of several chunks: a vocabulary and a layer too large to be read at once."""
    sizes: dict[str, Any] = {"dtype": dtype, "hidden": 64, "inner": inner, "vocabulary": 40_003}
    make_model(Path("model"), family, **sizes)
    with drawing(SECRET):
        mask("model", "server", key=KEY, p1=0.3, axis=axis)
    export_proxy(
        "server", "proxies/{client}", client=("ann", "bob"), round=3, key=KEY, ledger=LEDGER, p2=0.1, format=format
    )
    records = digests("server", "proxies", LEDGER)
    return {"outputs/large.json": {f"{family} {dtype} {format} {axis}: {what}": made for what, made in records.items()}}


# ------------------------------------------------------------------------------------------------ sources, releases

COMPANIONS = {
    "generation_config.json": {"eos_token_id": 2, "_from_model_config": True, "transformers_version": "5.0.0"},
    "special_tokens_map.json": {"pad_token": "[PAD]", "unk_token": {"content": "[UNK]", "lstrip": False}},
    "tokenizer.json": {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"[PAD]": 0}, "unk_token": "[UNK]"}},
    "tokenizer_config.json": {
        "name_or_path": "/home/owner/secret",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "tokenizer_file": None,
        "extra": {"path": "/data/models/secret/v3", "list": ["a", "/data/models/secret"]},
        "chat_template": "{{ '/home/owner' }}",
        "added_tokens_decoder": {"0": {"content": "/a/b/c"}},
    },
}


def sources() -> Files:
    """Models in other shapes: one file, files beside it, numbers at the edge of what a dtype holds."""
    make_model(Path("model"), "bert")
    config = json.loads(Path("model/config.json").read_text())
    config |= {"_name_or_path": "/home/owner/model", "id2label": {"0": "/a/b"}, "auto_map": {"AutoModel": "x--y.Z"}}
    Path("model/config.json").write_text(json.dumps(config))
    for name, document in COMPANIONS.items():
        Path("model", name).write_text(json.dumps(document, indent=1))
    Path("model/vocab.txt").write_text("[PAD]\n[UNK]\n")
    Path("model/notes.txt").write_text("not for anybody")
    for dtype in DTYPES:
        write_model(Path(f"edge-{dtype}"), edged(make_tensors("llama", dtype=dtype)), make_config("llama", dtype))
    places = ["model", "model/model.safetensors", *(f"edge-{dtype}" for dtype in DTYPES)]
    records: Records = {}
    for number, source in enumerate(places):
        key, server = Path(f"{number}.key"), f"server-{number}"
        with drawing(SECRET):
            mask(source, server, key=key, p1=0.2, rescale=False)
        records |= digests(key, server)
        for format in ("fp4", "int8", "nf2"):
            records |= attempt(f"{server} {format}", partial(packed, server, key, format))
    return {"outputs/sources.json": records}


def packed(server: str, key: Path, format: str) -> Records:
    """A quantized server model, and a proxy of it."""
    model, proxy = f"{server}-{format}", f"{server}-{format}-proxy"
    quantize(server, model, format=format)
    export_proxy(model, proxy, client="ann", round=1, key=key, p2=0.2, ledger=f"{proxy}.jsonl")
    return digests(model, proxy, f"{proxy}.jsonl")


def edged(tensors: Tensors) -> Tensors:
    """The same with the largest, the smallest and equal numbers, and blocks of zeros, in every matrix."""
    made = {}
    for name, (dtype, bits) in tensors.items():
        values = to_floats(bits, dtype).copy()
        flat = values.reshape(-1)
        flat[1::64] = (3e38, -3e38)[len(name) % 2] if dtype != "F16" else 65504
        flat[5:40] = 0
        flat[300:364] = 0.125
        flat[400:410] = 2.0**-24
        made[name] = (dtype, to_bits(np.clip(values, -3.3e38, 3.3e38), dtype))
    return made


def releases() -> Files:
    """More clients than are written at once; releases repeated, resumed after a torn line, and of both schedules."""
    make_model(Path("model"), "qwen2")
    fixed_key(SECRET, lambda: mask("model", "scratch", key=KEY, p1=0.2))
    usual: dict[str, Any] = {"key": KEY, "ledger": LEDGER, "p2": 0.3}
    everyone = [f"client-{number:03}" for number in range(133)]
    export_proxy("model", "all/{client}", client=everyone, round=1, **usual)
    records = {"133 proxies": sha256(listed("all")), "133 releases": sha256(LEDGER)}
    others = [("client-007", 1, "fresh"), ("eve", 2, "sticky"), ("eve", 3, "sticky"), ("Zoe.9_x", 2**53, "fresh")]
    for number, (client, round, schedule) in enumerate(others):
        export_proxy("model", f"proxy-{number}", client=client, round=round, **usual | {"schedule": schedule})
        records |= digests(f"proxy-{number}") | {f"ledger after proxy-{number}": sha256(LEDGER)}
    with LEDGER.open("ab") as ledger:
        ledger.write(b'{"client": "torn')
    export_proxy("model", "after", client="late", round=4, **usual)
    return {"outputs/releases.json": records | {"ledger after a torn line": sha256(LEDGER)}}


def listed(folder: str) -> Path:
    """A file with the digests of all files in a folder, in the place of many entries."""
    path = Path(f"{folder}.txt")
    path.write_text("".join(f"{digest} {name}\n" for name, digest in digests(folder).items()))
    return path


def jobs() -> dict[str, Job]:
    """The jobs of this section."""
    made: dict[str, Job] = {f"{case.family} {case.format}": partial(play, case) for case in grid()}
    made |= {f"hiding {family}": partial(hiding, family) for family in SHAPES}
    made |= {"bases": bases, "sources": sources, "releases": releases}
    of = [("llama", "F32"), ("gpt2", "F16"), ("gpt_oss", "BF16")]
    made |= {f"formats {family}": partial(formats, family, dtype) for family, dtype in of}
    made |= {"large bert": partial(large, "bert", "F16", "nf3", "element", 33_000)}
    made |= {"large gpt2": partial(large, "gpt2", "BF16", "int8", "input")}
    return made | {"large llama": partial(large, "llama", "F32", "nf4", "neuron")}
