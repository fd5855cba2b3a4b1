"""A public base that is not the same file as the model: matched by name, rounded, resized, or refused.

The reference is another base, made here with numpy, that has the model's own names, dtypes and shapes: both must give
the same bytes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedqsn_cli import audit, export_proxy, inspect, mask, quantize
from fedqsn_cli.models.model import open_model
from fedqsn_cli.models.public_base import KINDS, open_base
from fedqsn_cli.quantization.layout import layout_of
from support.families import build
from support.helpers import (
    Tensors,
    contents,
    hidden_elements,
    make_config,
    make_tensors,
    nothing_written,
    read_model,
    to_bits,
    to_floats,
    write_model,
)
from support.models import CONFIG_DTYPES
from support.processes import Outcome, run
from support.scenario import replaced

Array = NDArray[Any]


@dataclass
class Pair:
    """A model, its public base, and the same base as the model would have it.

    Args:
        counts: how many masked tensors are matched in each way, where that is not "exact".
    """

    model: Tensors
    base: Tensors
    wanted: Tensors
    config: dict[str, Any]
    base_config: dict[str, Any]
    counts: dict[str, int] = field(default_factory=dict)

    def write(self, folder: Path, shards: int = 1) -> Path:
        write_model(folder / "model", self.model, self.config)
        write_model(folder / "base", self.base, self.base_config, shards=shards)
        write_model(folder / "wanted", self.wanted, self.config)
        return folder


def pair(family: str, dtype: str = "F32", **sizes: int) -> Pair:
    """A model and a base of its very shapes."""
    model, base = (make_tensors(family, dtype=dtype, seed=seed, **sizes) for seed in (0, 1))
    config = make_config(family, dtype)
    return Pair(model, base, dict(base), config, dict(config))


def stripped(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def bare(family: str, prefix: str) -> Pair:
    """The base is the bare encoder or decoder, without heads."""
    made = pair(family)
    heads = [name for name in made.base if name.startswith(("classifier", "lm_head"))]
    for name in heads:
        del made.base[name]
        made.wanted[name] = ("F32", np.zeros_like(made.wanted[name][1]))
    made.base = stripped(made.base, prefix)
    made.counts = {"zeros": sum(name.endswith("weight") for name in heads)}
    return made


def under_a_head(family: str, prefix: str) -> Pair:
    """The model is bare, and the base has heads that the model has not."""
    made = pair(family)
    made.model, made.wanted = stripped(made.model, prefix), stripped(made.wanted, prefix)
    for name in [name for name in made.model if name.startswith(("classifier", "lm_head"))]:
        del made.model[name], made.wanted[name]
    made.base["cls.predictions.transform.dense.weight"] = ("F32", np.ones((32, 32), np.uint32))
    return made


def without_pooler() -> Pair:
    made = pair("bert")
    for name in [name for name in made.base if "pooler" in name or "classifier" in name]:
        del made.base[name]
        made.wanted[name] = ("F32", np.zeros_like(made.wanted[name][1]))
    made.counts = {"zeros": 3}  # the pooler, its bias, the classifier
    return made


def other_labels() -> Pair:
    made = pair("bert")
    made.base["classifier.weight"] = ("F32", np.ones((3, 32), np.uint32))
    made.base["classifier.bias"] = ("F32", np.ones(3, np.uint32))
    made.wanted["classifier.weight"] = ("F32", np.zeros((5, 32), np.uint32))
    made.counts = {"zeros": 1}
    return made


def resized(family: str, rows: int, *names: str, dtype: str = "F32") -> Pair:
    """The base has another vocabulary."""
    made = pair(family, dtype)
    for name in names:
        _, bits = made.base[name]
        longer = np.concatenate([bits, bits[::-1]])[:rows]
        made.base[name] = (dtype, longer)
        made.wanted[name] = (dtype, _fitted(longer, len(bits)))
    made.counts = {"resized": len(names)}
    return made


def _fitted(bits: Array, rows: int) -> Array:
    return np.concatenate([bits, np.zeros((max(0, rows - len(bits)), *bits.shape[1:]), bits.dtype)])[:rows]


def tied_without_the_copy(rows: int) -> Pair:
    """The model's file holds a copy of the tied embedding, the base's does not."""
    made = resized("llama-tied", rows, "model.embed_tokens.weight")
    made.wanted["lm_head.weight"] = made.wanted["model.embed_tokens.weight"]
    del made.base["lm_head.weight"]
    made.counts = {"resized": 2} if rows != 41 else {"tied": 1}
    return made


def untied_base() -> Pair:
    """The model is tied, the base is not: both copies get the embedding."""
    made = pair("llama-tied")
    made.base["lm_head.weight"] = ("F32", made.base["lm_head.weight"][1][::-1].copy())
    made.base_config["tie_word_embeddings"] = False
    made.counts = {"tied": 1}
    return made


def rounded(family: str, dtype: str, other: str) -> Pair:
    """The base has another dtype."""
    made = pair(family, dtype)
    for name, (kind, bits) in make_tensors(family, dtype=other, seed=1).items():
        made.base[name] = (kind, bits)
        if kind == other:
            made.wanted[name] = (dtype, to_bits(to_floats(bits, other), dtype))
    made.base_config["dtype"] = CONFIG_DTYPES[other]
    made.counts = {"converted": -1}
    return made


def everything_at_once() -> Pair:
    """A bare F32 decoder with a shorter vocabulary under a BF16 causal model."""
    made = rounded("llama", "BF16", "F32")
    embedding = made.base["model.embed_tokens.weight"][1][:29]
    made.base["model.embed_tokens.weight"] = ("F32", embedding)
    made.wanted["model.embed_tokens.weight"] = ("BF16", _fitted(to_bits(to_floats(embedding, "F32"), "BF16"), 41))
    del made.base["lm_head.weight"]
    made.wanted["lm_head.weight"] = ("BF16", np.zeros((41, 32), np.uint16))
    made.base = stripped(made.base, "model.")
    made.counts = {"converted": 5, "resized": 1, "zeros": 1}
    return made


WORD = "bert.embeddings.word_embeddings.weight"
PAIRS: dict[str, Callable[[], Pair]] = {
    "the same": lambda: pair("bert"),
    "bare bert": lambda: bare("bert", "bert."),
    "bare gpt2": lambda: bare("gpt2", "transformer."),
    "bare llama": lambda: bare("llama", "model."),
    "bare gpt_oss": lambda: bare("gpt_oss", "model."),
    "bert under a head": lambda: under_a_head("bert", "bert."),
    "llama under a head": lambda: under_a_head("llama", "model."),
    "t5 with more heads": lambda: under_a_head("t5", ""),
    "without a pooler": without_pooler,
    "other labels": other_labels,
    "longer vocabulary": lambda: resized("bert", 50, WORD),
    "shorter vocabulary": lambda: resized("bert", 30, WORD),
    "shorter vocabulary, untied output": lambda: resized("llama", 30, "model.embed_tokens.weight", "lm_head.weight"),
    "longer vocabulary in BF16": lambda: resized("qwen2", 60, "model.embed_tokens.weight", dtype="BF16"),
    "tied copy left out": lambda: tied_without_the_copy(41),
    "tied copy left out, shorter vocabulary": lambda: tied_without_the_copy(30),
    "tied copy left out, longer vocabulary": lambda: tied_without_the_copy(60),
    "tied copies, both shorter": lambda: resized("llama-tied", 30, "model.embed_tokens.weight", "lm_head.weight"),
    "untied base": untied_base,
    "everything at once": everything_at_once,
} | {
    f"{family} {dtype} of {other}": lambda f=family, d=dtype, o=other: rounded(f, d, o)
    for (dtype, other), family in zip(
        itertools.permutations(("F32", "F16", "BF16"), 2),
        ("bert", "gpt2", "gpt_oss", "llama", "t5", "mixtral"),
        strict=True,
    )
}


@pytest.mark.parametrize("name", PAIRS)
def test_holes_hold_what_a_base_of_the_models_own_shapes_would_put_there(name: str, folder: Path) -> None:
    made = PAIRS[name]()
    made.write(folder)
    key = folder / "job.key"
    found = mask(
        str(folder / "model"), folder / "server", key=key, p1=0.5, fill="base", public_base=str(folder / "base")
    )
    mask(str(folder / "model"), folder / "reference", key=key, fill="base", public_base=str(folder / "wanted"))
    assert contents(folder / "server") == contents(folder / "reference")
    hidden, server = hidden_elements(folder / "model", key), read_model(folder / "server")
    assert any(flags.any() for flags in hidden.values())
    for tensor, (_, bits) in made.model.items():
        np.testing.assert_array_equal(server[tensor][1], np.where(hidden[tensor], made.wanted[tensor][1], bits))
    assert found.public_base is not None
    others = {kind: count for kind, count in found.public_base.items() if count and kind not in {"exact", "prefix"}}
    masked = sum(found.public_base.values())
    assert others == {kind: masked if count < 0 else count for kind, count in made.counts.items() if count}


@pytest.mark.parametrize("format", ["nf4", "int8", "nf2", "none"])
@pytest.mark.parametrize("axis", ["neuron", "input", "element"])
@pytest.mark.parametrize("name", ["bare gpt2", "everything at once", "without a pooler", "gpt_oss BF16 of F32"])
def test_proxies_are_the_same_as_with_a_base_of_the_models_own_shapes(
    name: str, axis: str, format: str, folder: Path
) -> None:
    if name.startswith("gpt_oss"):
        rounded("gpt_oss", "BF16", "F32").write(folder, shards=3)
    else:
        PAIRS[name]().write(folder, shards=3)
    for base in ("base", "wanted"):
        export_proxy(
            str(folder / "model"),
            folder / base.upper(),
            client="ann",
            round=1,
            key=folder / "key",
            axis=axis,
            ledger=folder / "ledger.jsonl",
            p1=0.4,
            p2=0.3,
            format=format,
            fill="base",
            public_base=str(folder / base),
        )
    proxy = contents(folder / "BASE")
    assert proxy == contents(folder / "WANTED")
    assert json.loads(proxy["proxy.json"])["public_base"].keys() == {"reference", "sha256"}
    assert len((folder / "ledger.jsonl").read_text().splitlines()) == 1  # one and the same release


@pytest.mark.parametrize("name", ["bare gpt2", "everything at once"])
def test_server_and_quantized_server_models_take_the_same_base(name: str, folder: Path) -> None:
    PAIRS[name]().write(folder, shards=3)
    base: dict[str, Any] = {"fill": "base", "public_base": str(folder / "base")}
    mask(str(folder / "model"), folder / "server", key=folder / "key", p1=0.4, **base)
    quantize(str(folder / "server"), folder / "packed", format="nf4")
    for source in ("model", "server", "packed"):
        export_proxy(
            str(folder / source),
            folder / f"from-{source}",
            client="ann",
            round=1,
            key=folder / "key",
            ledger=folder / "ledger.jsonl",
            p2=0.3,
            **base,
        )
    assert contents(folder / "from-model") == contents(folder / "from-server") == contents(folder / "from-packed")


@pytest.mark.parametrize("kind", ["random", "nan", "all of it"])
def test_i1_with_an_odd_base_no_byte_depends_on_hidden_weights(kind: str, folder: Path) -> None:
    made = everything_at_once()
    made.write(folder)

    def export(source: str, out: str) -> dict[str, bytes]:
        export_proxy(
            str(folder / source),
            folder / out,
            client="ann",
            round=1,
            key=folder / "key",
            p1=0.5,
            p2=0.3,
            ledger=folder / "ledger.jsonl",
            fill="base",
            public_base=str(folder / "base"),
        )
        return contents(folder / out)

    before = export("model", "proxy")
    hidden = hidden_elements(folder / "model", folder / "key")
    changed = {name: (dtype, replaced(bits, dtype, hidden[name], kind)) for name, (dtype, bits) in made.model.items()}
    write_model(folder / "changed", changed, made.config)
    assert export("changed", "again") == before


@pytest.mark.parametrize("name", ["bare gpt2", "everything at once", "gpt_oss BF16 of F32"])
def test_rows_can_be_read_in_any_portions(name: str, folder: Path) -> None:
    """Chunks only: nothing of the base is kept."""
    made = rounded("gpt_oss", "BF16", "F32") if name.startswith("gpt_oss") else PAIRS[name]()
    made.write(folder)
    model = open_model(str(folder / "model"))
    base = open_base(str(folder / "base"), model)
    for tensor in model.plan.tensors:
        if not tensor.masked:
            continue
        storage = layout_of(tensor, None)
        lead, rows, cols = storage.view
        wanted = made.wanted[tensor.name][1].reshape(lead * rows, cols)
        for step in (1, 3, lead * rows):
            parts = [
                base.read_rows(tensor.name, storage, first, min(step, lead * rows - first))
                for first in range(0, lead * rows, step)
            ]
            np.testing.assert_array_equal(np.concatenate(parts).view(wanted.dtype), wanted)


@pytest.mark.parametrize(
    ("family", "head", "base_head"),
    [
        ("bert", "BertForSequenceClassification", "BertForMaskedLM"),
        ("bert", "BertForMaskedLM", "BertForSequenceClassification"),
        ("bert", "BertForSequenceClassification", "BertModel"),
        ("bert", "BertModel", "BertForMaskedLM"),
        ("roberta", "RobertaForSequenceClassification", "RobertaForMaskedLM"),
        ("distilbert", "DistilBertForSequenceClassification", "DistilBertForMaskedLM"),
        ("albert", "AlbertForSequenceClassification", "AlbertForMaskedLM"),
        ("electra", "ElectraForSequenceClassification", "ElectraForMaskedLM"),
        ("deberta-v2", "DebertaV2ForSequenceClassification", "DebertaV2ForMaskedLM"),
        ("modernbert", "ModernBertForSequenceClassification", "ModernBertForMaskedLM"),
        ("gpt2", "GPT2ForSequenceClassification", "GPT2LMHeadModel"),
        ("gpt2", "GPT2LMHeadModel", "GPT2Model"),
        ("llama", "LlamaForSequenceClassification", "LlamaForCausalLM"),
        ("opt", "OPTForSequenceClassification", "OPTForCausalLM"),
        ("t5", "T5ForSequenceClassification", "T5ForConditionalGeneration"),
    ],
)
def test_what_transformers_saves_with_one_head_is_a_base_for_another(
    family: str, head: str, base_head: str, folder: Path
) -> None:
    build(family, folder / "model", head=head)
    build(family, folder / "base", head=base_head, seed=3)
    matches = inspect(folder / "model", public_base=str(folder / "base")).public_base
    assert matches is not None
    zeros = {match.name for match in matches if match.kind == "zeros"}
    assert len(zeros) <= 4
    for name in zeros:
        assert any(part in name for part in ("classifier", "pooler", "predictions", "score", "head"))
    assert {match.kind for match in matches} <= {"exact", "prefix", "tied", "zeros"}


# ------------------------------------------------------------------------------------------------ refusals


def changed(change: Callable[[Tensors], None], dtype: str = "F32") -> Pair:
    made = pair("bert", dtype)
    change(made.base)
    return made


def _drop(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


def _put(name: str, dtype: str, bits: Array) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: (dtype, bits)})


QUERY = "bert.encoder.layer.0.attention.self.query"
REFUSED: dict[str, tuple[Callable[[], Pair], str]] = {
    "a layer is missing": (lambda: changed(_drop(f"{QUERY}.weight")), "no such tensor"),
    "a bias of a layer is missing": (lambda: changed(_drop(f"{QUERY}.bias")), "no such tensor"),
    "the embedding is missing": (lambda: changed(_drop(WORD)), "no such tensor"),
    "another model": (
        lambda: Pair(pair("bert").model, pair("llama").base, {}, make_config("bert"), make_config("llama")),
        "no such tensor",
    ),
    "fewer inner neurons": (
        lambda: changed(_put("bert.encoder.layer.0.intermediate.dense.weight", "F32", np.zeros((40, 32), np.uint32))),
        "F32 [40, 32], the model F32 [48, 32]",
    ),
    "another width": (lambda: changed(_put(WORD, "F32", np.zeros((41, 31), np.uint32))), "[41, 31]"),
    "a head of another width": (
        lambda: changed(_put("classifier.weight", "F32", np.zeros((5, 31), np.uint32))),
        "[5, 31]",
    ),
    "fewer positions": (
        lambda: changed(_put("bert.embeddings.position_embeddings.weight", "F32", np.zeros((5, 32), np.uint32))),
        "[5, 32]",
    ),
    "integers": (lambda: changed(_put(f"{QUERY}.weight", "I8", np.zeros((32, 32), np.int8))), "I8 [32, 32]"),
    "double precision": (lambda: changed(_put(f"{QUERY}.weight", "F64", np.zeros((32, 32)))), "F64 [32, 32]"),
    "too large for the model": (
        lambda: changed(_put(f"{QUERY}.weight", "F32", np.full((32, 32), 65520, np.float32).view(np.uint32)), "F16"),
        "too large for F16",
    ),
    "not finite": (
        lambda: changed(_put(f"{QUERY}.weight", "F32", np.full((32, 32), np.nan, np.float32).view(np.uint32)), "BF16"),
        "NaN or infinity",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_base_that_does_not_fit_is_refused_with_one_line(name: str, folder: Path) -> None:
    make, message = REFUSED[name]
    make().write(folder)
    for command in ("mask", "export-proxy"):
        more: list[str | Path] = ["--client", "ann", "--round", "1", "--p2", "0.1", "--ledger", folder / "ledger"]
        with nothing_written(folder):
            outcome = run(
                command,
                folder / "model",
                "--out",
                folder / "out",
                "--key",
                folder / "key",
                "--p1",
                "0.5",
                "--fill",
                "base",
                "--public-base",
                folder / "base",
                *(more if command == "export-proxy" else []),
            )
        assert_refused(outcome, message)


def assert_refused(outcome: Outcome, message: str) -> None:
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.count("\n") == 1
    assert message in outcome.err


def test_only_a_dense_model_that_anybody_may_have_is_a_base(folder: Path) -> None:
    pair("bert").write(folder)
    key = folder / "key"
    mask(str(folder / "base"), folder / "server", key=key, p1=0.5)
    quantize(str(folder / "base"), folder / "packed", format="nf4")
    export_proxy(
        str(folder / "server"), folder / "proxy", client="ann", round=1, key=key, p2=0.1, ledger=folder / "ledger.jsonl"
    )
    messages = {"server": "server model", "packed": "quantized", "proxy": "proxy", "nothing": "no such"}
    for base, message in messages.items():
        outcome = run("inspect", folder / "model", "--public-base", folder / base)
        assert_refused(outcome, message)


# ------------------------------------------------------------------------------------------------ what is said


def test_inspect_shows_what_fills_each_masked_tensor(folder: Path) -> None:
    everything_at_once().write(folder)
    shown = run("inspect", folder / "model", "--show-plan", "--public-base", folder / "base")
    assert shown.code == 0
    assert "5 tensors converted, 1 resized, 1 without (zeros)" in shown.out
    document = json.loads(run("inspect", folder / "model", "--public-base", folder / "base", "--json").out)
    rows = {row["name"]: row for row in document["public_base"]}
    assert rows["model.embed_tokens.weight"] == {
        "name": "model.embed_tokens.weight",
        "kind": "resized",
        "source": "embed_tokens.weight",
        "dtype": "F32",
        "shape": [29, 32],
    }
    assert rows["lm_head.weight"]["kind"] == "zeros"
    assert document["plan"] is None


def test_inspect_needs_a_model_for_a_base(folder: Path) -> None:
    pair("bert").write(folder)
    mask(str(folder / "model"), folder / "server", key=folder / "key", p1=0.5)
    assert run("inspect", folder / "key", "--public-base", folder / "base").code == 2
    assert run("inspect", folder / "server", "--public-base", folder / "base").code == 0


def test_mask_and_export_proxy_sum_the_matches_up(folder: Path) -> None:
    without_pooler().write(folder)
    base = ["--fill", "base", "--public-base", folder / "base", "--key", folder / "key"]
    shown = run("mask", folder / "model", "--out", folder / "server", "--p1", "0.5", *base)
    assert "8 tensors as they are, 3 without (zeros)" in shown.out
    made = run(
        "export-proxy",
        folder / "server",
        "--out",
        folder / "proxy",
        "--client",
        "ann",
        "--round",
        "1",
        "--p2",
        "0.1",
        "--ledger",
        folder / "ledger.jsonl",
        *base,
        "--json",
    )
    counts = json.loads(made.out)["public_base"]
    assert list(counts) == list(KINDS)
    assert counts == {"exact": 8, "prefix": 0, "tied": 0, "converted": 0, "resized": 0, "zeros": 3}
    plain = run("mask", folder / "model", "--out", folder / "zeros", "--key", folder / "key", "--json")
    assert json.loads(plain.out)["public_base"] is None


# ------------------------------------------------------------------------------------------------ audit


def audited(folder: Path, base: str) -> Any:
    return audit(
        [folder / "proxy"],
        truth=folder / "model",
        key=folder / "key",
        ledger=folder / "ledger.jsonl",
        public_base=folder / base,
    )


def release(folder: Path, **options: Any) -> None:
    export_proxy(
        str(folder / "model"),
        folder / "proxy",
        client="ann",
        round=1,
        key=folder / "key",
        p1=0.5,
        p2=0.3,
        ledger=folder / "ledger.jsonl",
        **options,
    )


@pytest.mark.parametrize("name", ["bare bert", "everything at once", "tied copy left out, shorter vocabulary"])
def test_an_audit_matches_the_base_in_the_same_way(name: str, folder: Path) -> None:
    PAIRS[name]().write(folder)
    release(folder, fill="base", public_base=str(folder / "base"))
    found = audited(folder, "base")
    assert found.verdict == "passed"
    assert found.recovery[0].best.delta_recovered is not None
    assert {check.status for check in found.checked if check.rule == "FQ001"} == {"pass"}


def test_an_audit_finds_holes_that_hold_another_base(folder: Path) -> None:
    PAIRS["bare bert"]().write(folder)
    other = make_tensors("bert", seed=5)
    write_model(folder / "other", other, make_config("bert"))
    release(folder, fill="base", public_base=str(folder / "base"))
    assert audited(folder, "other").verdict == "broken"


def test_an_audit_with_a_base_that_cannot_have_filled_the_holes_is_incomplete(folder: Path) -> None:
    pair("bert").write(folder)
    write_model(folder / "llama", make_tensors("llama", seed=5), make_config("llama"))
    release(folder, fill="base", public_base=str(folder / "base"))
    found = audited(folder, "llama")
    assert found.verdict == "incomplete"
    assert any(one.rule == "FQ904" and "no such tensor" in one.message for one in found.findings)


def test_an_attacker_takes_of_a_base_what_fits(folder: Path) -> None:
    """With zero fill the base only measures: a layer that it lacks is all secret."""
    changed(_drop(f"{QUERY}.weight")).write(folder)
    release(folder)
    found = audited(folder, "base")
    assert found.verdict == "passed"
    tensors = {one.tensor: one.delta_recovered for one in found.recovery[0].tensors}
    assert tensors[f"{QUERY}.weight"] is None and tensors[WORD] is not None
