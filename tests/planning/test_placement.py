"""Where the server mask hides and how much: --where, --layers and --p1-schedule as a part of the plan."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqsn_cli.errors import InputError, PlanError
from fedqsn_cli.models.plan_file import load_overrides
from fedqsn_cli.planning.placement import layers_text, parse_layers, parse_schedule, schedule_text
from fedqsn_cli.planning.plan import Plan, make_plan
from fedqsn_cli.planning.roles import LINEAR_ROLES, rules
from fedqsn_cli.planning.tensor_plan import TensorPlan
from support.deep_models import deep
from support.families import EVERY_HEAD, LAYERS, build, read_config, read_shapes
from support.helpers import make_config


def planned(name: str, config: dict[str, Any] | None = None, **overrides: Any) -> dict[str, TensorPlan]:
    """The plan of a deep model, by name; overrides in their canonical form."""
    shapes = {tensor: (dtype, bits.shape) for tensor, (dtype, bits) in deep(name).items()}
    plan = make_plan(shapes, make_config(name) if config is None else config, overrides={"rule": [], **overrides})
    return {tensor.name: tensor for tensor in plan.tensors}


def masked(plan: dict[str, TensorPlan]) -> set[str]:
    """What is masked, each by the last parts of its name."""
    return {name for name, tensor in plan.items() if tensor.masked and tensor.role != "bias"}


# ---------------------------------------------------------------- which part of a layer


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Any, Any]]:
    """Shapes and config of every family with every head."""
    found = {}
    for name, head in EVERY_HEAD:
        folder = build(name, tmp_path_factory.mktemp(head), head=head)
        found[name, head] = read_shapes(folder), read_config(folder)
    return found


@pytest.mark.parametrize(("name", "head"), EVERY_HEAD)
def test_every_matrix_of_every_layer_is_attention_or_mlp_and_each_has_outputs(
    plans: dict[Any, Any], name: str, head: str
) -> None:
    outputs: dict[int, set[str]] = {}
    for tensor in make_plan(*plans[name, head]).tensors:
        if tensor.role not in LINEAR_ROLES:
            continue
        fits = [part for part in rules().parts if part.fits(tensor.name)]
        assert len(fits) == 1, (tensor.name, fits)
        layer = rules().layer(tensor.name)
        assert (fits[0].name == "neither") == (layer is None), tensor.name
        if layer is not None and fits[0].output:
            outputs.setdefault(layer, set()).add(fits[0].name)
    assert outputs == dict.fromkeys(range(1 if name == "albert" else LAYERS), {"attention", "mlp"})


@pytest.mark.parametrize(("name", "head"), EVERY_HEAD)
def test_the_three_parts_of_every_family_are_what_they_are_called(plans: dict[Any, Any], name: str, head: str) -> None:
    shapes, config = plans[name, head]
    by_part = {
        where: {t.name for t in make_plan(shapes, config, overrides={"rule": [], "where": where}).tensors if t.masked}
        for where in ("outputs", "mlp", "attention")
    }
    everything = make_plan(shapes, config).tensors
    weights = {t.name: t for t in everything if t.masked and t.role != "bias"}
    assert not by_part["mlp"] & by_part["attention"]
    numbered = {n for n, t in weights.items() if t.role in LINEAR_ROLES and rules().layer(n) is not None}
    assert (by_part["mlp"] | by_part["attention"]) & weights.keys() == numbered
    inside = by_part["outputs"] & numbered
    assert 0 < len(inside) < len(numbered)
    embeddings = {n for n, t in weights.items() if t.role == "embedding"}
    assert embeddings <= by_part["outputs"]
    tied = {t.name for t in everything if t.groups and t.groups[0] in embeddings}
    assert by_part["outputs"] & weights.keys() == inside | embeddings | tied


OTHERS = {
    "transformer.h.3.attn.out_proj": ("attention", True),  # GPT-J
    "transformer.h.3.mlp.fc_out": ("mlp", True),
    "transformer.h.3.attn.attention.out_proj": ("attention", True),  # GPT-Neo
    "transformer.h.3.attn.attention.k_proj": ("attention", False),
    "transformer.h.3.crossattention.q_attn": ("attention", False),
    "transformer.h.3.crossattention.c_proj": ("attention", True),
    "bert.encoder.layer.3.crossattention.output.dense": ("attention", True),
    "model.decoder.layers.3.encoder_attn.out_proj": ("attention", True),  # BART
    "mpnet.encoder.layer.3.attention.attn.o": ("attention", True),
    "transformer.blocks.3.attn.Wqkv": ("attention", False),  # MPT
    "transformer.blocks.3.ffn.down_proj": ("mlp", True),
    "model.layers.3.self_attn.kv_a_proj_with_mqa": ("attention", False),  # DeepSeek
    "model.layers.3.mlp.shared_experts.down_proj": ("mlp", True),
    "model.layers.3.block_sparse_moe.experts.1.w2": ("mlp", True),
    "model.layers.3.block_sparse_moe.output_linear": ("mlp", True),  # Granite
}


@pytest.mark.parametrize("module", OTHERS)
def test_further_families_are_known_too(module: str) -> None:
    fits = [(part.name, part.output) for part in rules().parts if part.fits(f"{module}.weight")]
    assert fits == [OTHERS[module]] and rules().layer(f"{module}.weight") == 3


def test_a_matrix_of_which_no_rule_knows_the_part_is_never_guessed() -> None:
    shapes = {"model.layers.0.self_attn.o_proj.weight": ("F32", (8, 8)), "model.layers.0.odd.weight": ("F32", (8, 8))}
    rule = {"match": "*.odd.weight", "role": "linear"}
    with pytest.raises(PlanError, match=r"odd\.weight: no rule knows which part .* where = mlp"):
        make_plan(shapes, None, overrides={"rule": [rule], "where": "mlp"})
    plan = make_plan(shapes, None, overrides={"rule": [{**rule, "masked": True}], "where": "mlp"})
    assert [tensor.masked for tensor in plan.tensors] == [False, True]
    assert all(tensor.masked for tensor in make_plan(shapes, None, overrides={"rule": [rule]}).tensors)


def test_what_is_not_hidden_is_still_quantized_and_its_bias_goes_with_it() -> None:
    plan = planned("bert", where="outputs")
    query, bias = "bert.encoder.layer.2.attention.self.query.weight", "bert.encoder.layer.2.attention.self.query.bias"
    assert (plan[query].masked, plan[query].quantized, plan[query].origin) == (False, True, "rules, --where")
    assert (plan[bias].masked, plan[bias].role) == (False, "bias")
    assert plan["bert.encoder.layer.2.output.dense.bias"].groups == ("bert.encoder.layer.2.output.dense.weight",)


# ---------------------------------------------------------------- layers


PLACES = st.sets(st.integers(0, 40) | st.sampled_from(["embeddings", "head"]), min_size=1)


@given(PLACES)
def test_a_list_of_layers_comes_back_as_it_was_and_is_the_shortest(places: set[Any]) -> None:
    text = layers_text(places)
    assert parse_layers(text) == places
    assert layers_text(parse_layers(", ".join(reversed(text.split(","))))) == text
    runs = sum(isinstance(p, int) and p - 1 not in places for p in places)
    assert len(text.split(",")) == runs + len(places & {"embeddings", "head"})


RATIOS = st.sampled_from([0.0, 0.25, 0.9]) | st.floats(0, 1, exclude_max=True)


@given(st.dictionaries(st.integers(0, 20) | st.sampled_from(["embeddings", "head"]), RATIOS, min_size=1))
def test_a_schedule_means_the_same_however_it_is_written(ratios: dict[Any, float]) -> None:
    schedule = parse_schedule(",".join(f"{place}={ratio}" for place, ratio in ratios.items()))
    assert {place: ratio for text, ratio in schedule.items() for place in parse_layers(text)} == ratios
    assert parse_schedule(schedule_text(schedule)) == schedule


@pytest.mark.parametrize("text", ["", "a", "3-", "-3", "5-3", "1,,2", "0.5", "0-99999", "layer 3", "embedding", "٣"])
def test_a_malformed_list_of_layers_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="neither a layer nor a range"):
        parse_layers(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("0-2", "has no ratio"),
        ("0=", "'' is not a ratio"),
        ("0=x", "'x' is not a ratio"),
        ("0=1", "is not a ratio"),
        ("0=nan", "nan is not a ratio"),
        ("0=-0.1", "is not a ratio"),
        ("=0.5", "neither a layer"),
        ("0-3=0.5,2=0.9", "layer 2 is given two ratios"),
        ("head=0.5,head=0.5", "head is given two"),
        ("", "no ratio"),
    ],
)
def test_a_malformed_schedule_is_refused(text: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        parse_schedule(text)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_only_the_layers_that_are_listed_are_hidden(name: str) -> None:
    everything = masked(planned(name))
    some = masked(planned(name, layers="1-2"))
    numbers = {tensor: re.search(r"\b(?:layers?|h|block)\.([0-9])\.", tensor) for tensor in everything}
    assert some == {tensor for tensor, found in numbers.items() if found and found[1] in "12"}
    words = masked(planned(name, layers="embeddings,1-2")) - some
    assert words == {tensor for tensor in everything if re.search(r"embeddings|embed_tokens|shared|wte|wpe", tensor)}


def test_layers_of_an_encoder_and_a_decoder_both_count(plans: dict[Any, Any]) -> None:
    shapes, config = plans["t5", "T5ForConditionalGeneration"]
    plan = make_plan(shapes, config, overrides={"rule": [], "layers": "1"})
    names = {tensor.name for tensor in plan.tensors if tensor.masked}
    assert names and {name.split(".layer.")[0] for name in names} == {"encoder.block.1", "decoder.block.1"}


def test_a_tied_head_is_one_group_with_the_embeddings_and_counts_as_such() -> None:
    tied = planned("llama-tied", layers="embeddings", p1={"embeddings": 0.5})
    assert masked(tied) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert {tied[name].p1 for name in masked(tied)} == {0.5}
    assert {tied[name].groups for name in masked(tied)} == {("model.embed_tokens.weight",)}
    assert "lm_head.weight" in masked(planned("llama-tied", where="outputs"))
    assert masked(planned("llama", layers="head")) == {"lm_head.weight"}


@pytest.mark.parametrize(
    ("name", "overrides", "problem"),
    [
        ("bert", {"layers": "0-4"}, "--layers: the model has no layer 4; it has embeddings,head,0-3"),
        ("bert", {"p1": {"7": 0.5}}, "--p1-schedule: the model has no layer 7"),
        ("llama-tied", {"layers": "head"}, "no head of its own; a head that is tied to the embeddings goes with them"),
        ("gpt2", {"p1": {"0,head": 0.5}}, "no head of its own"),
    ],
)
def test_a_place_that_the_model_does_not_have_is_refused(name: str, overrides: Any, problem: str) -> None:
    with pytest.raises(PlanError) as raised:
        planned(name, **overrides)
    assert problem in str(raised.value)


# ---------------------------------------------------------------- ratios


def test_what_a_schedule_does_not_list_has_the_jobs_ratio_and_biases_have_their_weights() -> None:
    plan = planned("bert", p1={"0-1": 0.9, "embeddings": 0.2})
    ratios = {name: tensor.p1 for name, tensor in plan.items() if tensor.masked}
    assert ratios["bert.encoder.layer.0.output.dense.weight"] == ratios["bert.encoder.layer.0.output.dense.bias"] == 0.9
    assert ratios["bert.embeddings.position_embeddings.weight"] == 0.2
    assert ratios["bert.encoder.layer.2.output.dense.weight"] is ratios["classifier.weight"] is None


def test_a_rule_of_a_plan_file_sets_a_ratio_and_wins(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text('where = "mlp"\nlayers = "1,0"\n[p1]\n"0-1" = 0.5\n[[rule]]\nmatch = "*layer.0.*"\np1 = 0\n')
    overrides = load_overrides(path)
    assert overrides == {
        "rule": [{"match": "*layer.0.*", "p1": 0.0}],
        "where": "mlp",
        "layers": "0-1",
        "p1": {"0-1": 0.5},
    }
    plan = planned("bert", **overrides)
    assert plan["bert.encoder.layer.0.output.dense.weight"].p1 == 0.0
    assert plan["bert.encoder.layer.0.output.dense.bias"].p1 == 0.0
    assert plan["bert.encoder.layer.1.output.dense.weight"].p1 == 0.5
    assert not plan["bert.encoder.layer.2.output.dense.weight"].masked


def test_the_plan_files_of_the_documentation_are_plan_files(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text("utf-8")
    blocks = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    for block in blocks:
        (tmp_path / "plan.toml").write_text(block)
        assert load_overrides(tmp_path / "plan.toml") != {"rule": []}
    assert len(blocks) == 2


def test_a_rule_can_hide_what_the_options_leave_visible_and_the_other_way_round() -> None:
    layer = "bert.encoder.layer.0."
    listed = [{"match": "*.pooler.*", "masked": True}, {"match": f"{layer}output.dense.weight", "masked": False}]
    plan = planned("bert", rule=listed, where="mlp")
    assert plan["bert.pooler.dense.weight"].masked and not plan[f"{layer}output.dense.weight"].masked
    assert plan[f"{layer}output.dense.weight"].cleared and not plan[f"{layer}attention.self.query.weight"].cleared


@pytest.mark.parametrize(
    ("name", "match", "problem"),
    [
        ("bert", "*layer.0.output.dense.bias", "has the mask of bert.encoder.layer.0.output.dense.weight, but another"),
        ("llama-tied", "lm_head.weight", "has the mask of model.embed_tokens.weight, but another p1"),
        ("bert", "*LayerNorm*", "fits nothing that is masked"),
    ],
)
def test_one_mask_has_one_ratio(name: str, match: str, problem: str) -> None:
    with pytest.raises(PlanError, match=re.escape(problem)):
        planned(name, rule=[{"match": match, "p1": 0.5}])


@pytest.mark.parametrize(
    "document",
    [
        {"where": "everywhere"},
        {"where": 3},
        {"layers": "x"},
        {"layers": 3},
        {"layers": ""},
        {"p1": 0.5},
        {"p1": {"0": 1}},
        {"p1": {"0": "0.5"}},
        {"p1": {"0": True}},
        {"p1": {"0-1": 0.5, "1": 0.2}},
        {"p1": []},
        {"rule": [{"match": "*", "p1": 1}]},
        {"rule": [{"match": "*", "p1": "0.1"}]},
        {"p2": {"0": 0.5}},
    ],
)
def test_overrides_that_cannot_be_are_refused(document: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        planned("bert", **document)


# ---------------------------------------------------------------- nothing changes for jobs without these options


def old_digest(plan: Plan) -> str:
    """As it was before tensors could have a ratio."""
    rows = [[t.name, list(t.shape), t.role, t.axis, list(t.groups), t.units, t.masked] for t in plan.tensors]
    document = {"format": "fedqsn-plan/1", "axis": plan.axis, "tensors": sorted(rows)}
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def plan_of(name: str, **overrides: Any) -> Plan:
    shapes = {tensor: (dtype, bits.shape) for tensor, (dtype, bits) in deep(name).items()}
    return make_plan(shapes, make_config(name), overrides={"rule": [], **overrides})


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-tied", "gpt_oss"])
def test_a_plan_without_ratios_has_the_digest_that_it_always_had(name: str) -> None:
    plain = plan_of(name)
    assert plain.digest == old_digest(plain) == plan_of(name, where="all", p1={}).digest
    assert plan_of(name, where="outputs").digest != plain.digest
    assert plan_of(name, p1={"0": 0.5}).digest not in {plain.digest, plan_of(name, p1={"0": 0.25}).digest}
