"""What a plan says: the role, units and group of each tensor, and what transformers and bitsandbytes make of it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqsn_cli.errors import InputError, PlanError
from fedqsn_cli.models.plan_file import load_overrides
from fedqsn_cli.planning.plan import Plan, make_plan
from fedqsn_cli.planning.skip_modules import EXPERTS, fits, skip_modules
from fedqsn_cli.planning.tensor_plan import MASK_AXES, TensorPlan
from support.families import EVERY_HEAD, FAMILIES, build, make_config, read_config, read_shapes

Shapes = dict[str, tuple[str, tuple[int, ...]]]
Planned = Callable[..., tuple[Plan, dict[str, Any]]]


@pytest.fixture(scope="session")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    """The plan and the config of a family's checkpoint, built once."""
    folders: dict[tuple[str, str], Path] = {}

    def of(name: str, head: str | None = None, **options: Any) -> tuple[Plan, dict[str, Any]]:
        key = name, head or FAMILIES[name].heads[0]
        if key not in folders:
            folders[key] = build(name, tmp_path_factory.mktemp(key[1]), head=key[1])
        config = read_config(folders[key])
        return make_plan(read_shapes(folders[key]), config, **options), config

    return of


def floats(**shapes: tuple[int, ...]) -> Shapes:
    """Tensors named with __ for a dot."""
    return {name.replace("__", "."): ("F32", shape) for name, shape in shapes.items()}


def one(shapes: Shapes, name: str, config: dict[str, Any] | None = None, **options: Any) -> TensorPlan:
    """The plan of one tensor among others."""
    return by_name(make_plan(shapes, config, **options))[name]


def by_name(plan: Plan) -> dict[str, TensorPlan]:
    return {tensor.name: tensor for tensor in plan.tensors}


def rule(**fields: Any) -> dict[str, Any]:
    return {"rule": [fields]}


LLAMA = {"model_type": "llama", "tie_word_embeddings": False}
DECODER: Shapes = floats(
    model__embed_tokens__weight=(97, 64),
    model__layers__0__self_attn__q_proj__weight=(64, 48),
    model__layers__0__self_attn__q_proj__bias=(64,),
    model__norm__weight=(64,),
    lm_head__weight=(97, 64),
)
Q = "model.layers.0.self_attn.q_proj.weight"
Q_BIAS = "model.layers.0.self_attn.q_proj.bias"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


# ---------------------------------------------------------------- every family


@pytest.mark.parametrize(("name", "head"), EVERY_HEAD)
def test_every_tensor_of_every_family_has_a_role(planned: Planned, name: str, head: str) -> None:
    assert planned(name, head)[0].unknown == []


@pytest.mark.parametrize("axis", MASK_AXES)
@pytest.mark.parametrize(("name", "head"), EVERY_HEAD)
def test_every_matrix_of_every_family_is_masked_and_quantized(
    planned: Planned, name: str, head: str, axis: str
) -> None:
    plan, _ = planned(name, head, axis=axis)
    public = ("bias", "buffer")
    matrices = [tensor for tensor in plan.tensors if len(tensor.shape) > 1 and tensor.role not in public]
    assert matrices and all(tensor.masked and tensor.quantized for tensor in matrices)


@pytest.mark.parametrize("axis", MASK_AXES)
@pytest.mark.parametrize(("name", "head"), EVERY_HEAD)
def test_units_fit_the_view_and_the_view_fits_the_shape(planned: Planned, name: str, head: str, axis: str) -> None:
    plan, _ = planned(name, head, axis=axis)
    for tensor in plan.tensors:
        lead, rows, cols = tensor.view
        assert lead * rows * cols == math.prod(tensor.shape)
        along = {"row": rows, "column": cols, "element": rows * cols}
        assert tensor.units == (along[tensor.axis] if tensor.axis else 0)
        assert len(tensor.groups) == (lead if tensor.masked else 0)
        assert tensor.masked == (tensor.axis is not None)
        assert all(plan.groups()[group] == tensor.units for group in tensor.groups)


@pytest.mark.parametrize(("name", "head"), EVERY_HEAD)
def test_transformers_replaces_exactly_the_packable_modules(planned: Planned, name: str, head: str) -> None:
    plan, config = planned(name, head)
    linear, kept_in_fp32 = linear_modules(name, head)
    entries = [*plan.skip_modules(config), *kept_in_fp32]
    assert replaced(linear, entries) == {t.name.removesuffix(".weight") for t in plan.tensors if t.packable}


@pytest.mark.parametrize(("name", "head"), [pair for pair in EVERY_HEAD if pair[0] != "falcon"])
def test_an_override_that_keeps_a_layer_dense_reaches_the_skip_list(planned: Planned, name: str, head: str) -> None:
    plan, config = planned(name, head)
    packable = sorted(tensor.name for tensor in plan.tensors if tensor.packable)
    plan, config = planned(name, head, overrides=rule(match=packable[0], quantized=False))
    linear, kept_in_fp32 = linear_modules(name, head)
    entries = [*plan.skip_modules(config), *kept_in_fp32]
    assert replaced(linear, entries) == {packed.removesuffix(".weight") for packed in packable[1:]}


def linear_modules(name: str, head: str) -> tuple[set[str], list[str]]:
    """Modules of a type that transformers replaces, by their names in memory; and what it never replaces."""
    import torch
    import transformers
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model = getattr(transformers, head)(make_config(name, head))
    modules = {
        path for path, module in model.named_modules() if isinstance(module, Conv1D) or type(module) is torch.nn.Linear
    }
    return modules, list(model._keep_in_fp32_modules or [])


def replaced(modules: set[str], entries: list[str]) -> set[str]:
    from transformers.quantizers.quantizers_utils import should_convert_module

    return {module for module in modules if should_convert_module(module, entries)}


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("roberta", "RobertaForSequenceClassification"),
        ("distilbert", "DistilBertForSequenceClassification"),
        ("gpt2", "GPT2LMHeadModel"),
        ("t5", "T5ForConditionalGeneration"),
        ("falcon", "FalconForCausalLM"),
        ("qwen3_moe", "Qwen3MoeForCausalLM"),
    ],
)
def test_bitsandbytes_packs_exactly_the_packable_tensors(name: str, head: str, tmp_path: Path) -> None:
    import transformers

    folder = build(name, tmp_path / "dense", head=head)
    plan = make_plan(read_shapes(folder), read_config(folder))
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=plan.skip_modules(read_config(folder))
    )
    model = getattr(transformers, head).from_pretrained(folder, quantization_config=how)
    model.save_pretrained(tmp_path / "packed")
    packed = {name for name in read_shapes(tmp_path / "packed") if f"{name}.absmax" in read_shapes(tmp_path / "packed")}
    assert packed == {tensor.name for tensor in plan.tensors if tensor.packable}


# ---------------------------------------------------------------- roles


@pytest.mark.parametrize(
    ("name", "head", "tensor", "role", "axis", "units"),
    [
        ("bert", None, "bert.encoder.layer.0.intermediate.dense.weight", "linear", "row", 128),
        ("bert", None, "bert.encoder.layer.0.intermediate.dense.bias", "bias", "row", 128),
        ("bert", None, "bert.embeddings.LayerNorm.bias", "norm", None, 0),
        ("bert", None, "bert.embeddings.token_type_embeddings.weight", "embedding", "column", 64),
        ("bert", None, "classifier.weight", "head", "column", 64),
        ("bert", None, "classifier.bias", "bias", None, 0),
        ("bert", "BertForMaskedLM", "cls.predictions.bias", "bias", None, 0),
        ("bert", "BertForMaskedLM", "cls.predictions.transform.dense.weight", "linear", "row", 64),
        ("roberta", None, "classifier.dense.weight", "linear", "row", 64),
        ("roberta", None, "classifier.out_proj.weight", "head", "column", 64),
        ("albert", None, "albert.encoder.embedding_hidden_mapping_in.weight", "linear", "row", 64),
        ("albert", None, "albert.pooler.weight", "linear", "row", 64),
        ("deberta-v2", None, "deberta.encoder.rel_embeddings.weight", "embedding", "column", 64),
        ("modernbert", None, "model.layers.0.attn.Wqkv.weight", "linear", "row", 192),
        ("gpt2", None, "transformer.h.0.mlp.c_fc.weight", "conv1d", "column", 256),
        ("gpt2", None, "transformer.h.0.mlp.c_fc.bias", "bias", "row", 256),
        ("gpt2", None, "transformer.wpe.weight", "embedding", "column", 64),
        ("gpt_neox", None, "embed_out.weight", "head", "column", 64),
        ("t5", None, "encoder.block.0.layer.1.DenseReluDense.wo.weight", "linear", "row", 64),
        ("t5", None, "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "embedding", "column", 4),
        ("mixtral", None, "model.layers.0.block_sparse_moe.experts.3.w2.weight", "expert", "row", 64),
        ("mixtral", None, "model.layers.0.block_sparse_moe.gate.weight", "router", "column", 64),
        ("qwen3_moe", None, "model.layers.0.mlp.experts.3.gate_proj.weight", "expert", "row", 32),
        ("gpt_oss", None, "model.layers.0.mlp.experts.gate_up_proj", "expert_stack", "column", 256),
        ("gpt_oss", None, "model.layers.0.mlp.experts.gate_up_proj_bias", "bias", "row", 256),
        ("gpt_oss", None, "model.layers.0.mlp.router.bias", "bias", None, 0),
        ("gpt_oss", None, "model.layers.0.self_attn.sinks", "norm", None, 0),
    ],
)
def test_role_axis_and_units(
    planned: Planned, name: str, head: str | None, tensor: str, role: str, axis: str | None, units: int
) -> None:
    found = by_name(planned(name, head)[0])[tensor]
    assert (found.role, found.axis, found.units) == (role, axis, units)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("t5", "decoder.block.1.layer.2.DenseReluDense.wo.weight"),
        ("falcon", "transformer.h.0.mlp.dense_h_to_4h.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.0.w1.weight"),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj"),
        ("llama", "model.embed_tokens.weight"),
        ("llama", "lm_head.weight"),
    ],
)
def test_what_bitsandbytes_cannot_hold_is_quantized_but_not_packable(planned: Planned, name: str, tensor: str) -> None:
    found = by_name(planned(name)[0])[tensor]
    assert found.quantized and not found.packable


def test_a_bias_hides_with_its_neuron(planned: Planned) -> None:
    plan = by_name(planned("gpt2")[0])
    weight, bias = plan["transformer.h.0.attn.c_attn.weight"], plan["transformer.h.0.attn.c_attn.bias"]
    assert bias.groups == weight.groups == ("transformer.h.0.attn.c_attn.weight",)
    assert bias.units == weight.units == 192 and not bias.quantized


def test_each_expert_of_a_stack_has_a_mask_of_its_own_that_its_bias_shares(planned: Planned) -> None:
    plan = by_name(planned("gpt_oss")[0])
    stack = plan["model.layers.0.mlp.experts.down_proj"]
    assert stack.view == (4, 128, 64) and stack.axis == "column"
    assert stack.groups == tuple(f"{stack.name}#{expert}" for expert in range(4))
    assert plan["model.layers.0.mlp.experts.down_proj_bias"].groups == stack.groups


def test_buffers_of_older_checkpoints_are_public() -> None:
    shapes: Shapes = {
        "h.0.attn.bias": ("F32", (1, 1, 64, 64)),
        "h.0.attn.masked_bias": ("F32", ()),
        "h.0.attn.c_attn.weight": ("F32", (64, 192)),
        "h.0.attn.c_attn.bias": ("F32", (192,)),
        "embeddings.position_ids": ("I64", (1, 64)),
        "rotary_emb.inv_freq": ("F64", (8,)),
    }
    plan = make_plan(shapes, {"model_type": "gpt2"})
    assert [tensor.role for tensor in plan.tensors] == ["buffer", "buffer", "conv1d", "bias", "buffer", "buffer"]


def test_older_names_of_norms_are_known() -> None:
    plan = make_plan(floats(a__LayerNorm__gamma=(64,), a__LayerNorm__beta=(64,)), {"model_type": "bert"})
    assert [tensor.role for tensor in plan.tensors] == ["norm", "norm"]


_HUB = {
    "bert": """bert.embeddings.LayerNorm.gamma 1 bert.embeddings.LayerNorm.beta 1 cls.predictions.bias 1
        cls.predictions.transform.LayerNorm.gamma 1 cls.predictions.transform.dense.weight 2
        cls.seq_relationship.weight 2 cls.seq_relationship.bias 1 embeddings.position_ids 0
        encoder.layer.0.attention.self.query.weight 2 encoder.layer.0.attention.self.query.bias 1 pooler.dense.weight 2
        pooler.dense.bias 1""",
    "gpt2": "h.0.attn.bias 4 h.0.attn.masked_bias 0 h.0.ln_1.weight 1 h.0.ln_1.bias 1 ln_f.weight 1 wte.weight 2",
    "gpt_neox": """gpt_neox.layers.0.attention.bias 4 gpt_neox.layers.0.attention.masked_bias 0
        gpt_neox.layers.0.attention.rotary_emb.inv_freq 1 gpt_neox.layers.0.attention.query_key_value.weight 2""",
    "gpt_neo": """transformer.h.0.attn.attention.bias 4 transformer.h.0.attn.attention.masked_bias 0
        transformer.h.0.attn.attention.out_proj.weight 2 transformer.h.0.mlp.c_fc.weight 2""",
    "llama": "model.layers.0.self_attn.rotary_emb.inv_freq 1 model.layers.0.mlp.down_proj.weight 2",
    "t5": """encoder.embed_tokens.weight 2 decoder.embed_tokens.weight 2 shared.weight 2 lm_head.weight 2
        decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight 2
        encoder.block.0.layer.1.DenseReluDense.wi_1.weight 2""",
    "deberta-v2": """deberta.encoder.rel_embeddings.weight 2 deberta.encoder.LayerNorm.weight 1
        lm_predictions.lm_head.bias 1 lm_predictions.lm_head.dense.weight 2 lm_predictions.lm_head.LayerNorm.weight 1
        mask_predictions.dense.weight 2 mask_predictions.classifier.weight 2 mask_predictions.LayerNorm.weight 1""",
    "electra": """discriminator_predictions.dense.weight 2 discriminator_predictions.dense_prediction.weight 2
        generator_predictions.LayerNorm.weight 1 generator_predictions.dense.weight 2 generator_lm_head.bias 1
        electra.embeddings_project.weight 2""",
    "mpnet": """encoder.layer.0.attention.attn.q.weight 2 encoder.relative_attention_bias.weight 2
        encoder.layer.0.attention.LayerNorm.weight 1 lm_head.dense.weight 2 lm_head.layer_norm.weight 1""",
    "bart": """model.shared.weight 2 model.encoder.embed_positions.weight 2 model.encoder.layernorm_embedding.weight 1
        model.encoder.layers.0.self_attn.out_proj.weight 2 model.encoder.layers.0.fc1.weight 2 final_logits_bias 2
        classification_head.dense.weight 2 classification_head.out_proj.weight 2""",
    "falcon": "transformer.h.0.ln_attn.weight 1 transformer.h.0.ln_mlp.bias 1 lm_head.weight 2",
    "deepseek_v3": """model.layers.0.self_attn.kv_a_proj_with_mqa.weight 2
        model.layers.0.self_attn.kv_a_layernorm.weight 1
        model.layers.3.mlp.gate.e_score_correction_bias 1 model.layers.3.mlp.shared_experts.up_proj.weight 2
        model.layers.3.mlp.experts.255.up_proj.weight 2""",
    "apertus": """model.layers.0.mlp.act_fn.alpha_n 1 model.layers.0.mlp.act_fn.alpha_p 1
        model.layers.0.mlp.act_fn.beta 0 model.layers.0.mlp.act_fn.eps 0 model.layers.0.self_attn.q_norm.weight 1""",
    "cohere": "model.layers.0.self_attn.q_norm.weight 2 model.layers.0.self_attn.k_norm.weight 2",
    "mpt": "transformer.blocks.0.attn.Wqkv.weight 2 transformer.blocks.0.norm_1.weight 1",
}


@pytest.mark.parametrize("model_type", _HUB)
def test_names_of_published_checkpoints_are_known(model_type: str) -> None:
    words = _HUB[model_type].split()
    shapes: Shapes = {}
    for name, ndim in zip(words[::2], words[1::2], strict=True):
        shapes[name] = ("I64" if name.endswith("_ids") else "F32", (64,) * int(ndim))
        if name.endswith((".ln_1.bias", ".ln_mlp.bias")):
            shapes[name.removesuffix("bias") + "weight"] = ("F32", (64,))
    assert make_plan(shapes, {"model_type": model_type}).unknown == []


@pytest.mark.parametrize(("model_type", "role"), [("gpt2", "conv1d"), ("gpt_bigcode", "linear"), (None, "unknown")])
def test_the_model_type_decides_what_c_attn_is(model_type: str | None, role: str) -> None:
    config = {"model_type": model_type} if model_type else None
    assert one(floats(h__0__attn__c_attn__weight=(64, 192)), "h.0.attn.c_attn.weight", config).role == role


# ---------------------------------------------------------------- the unknown


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("model.layers.0.mystery.weight", "F32", (64, 64)),
        ("model.layers.0.mystery", "F32", (64,)),
        ("mystery.bias", "BF16", (64,)),
        ("model.layers.0.self_attn.q_proj.qweight", "I32", (8, 64)),
        ("model.layers.0.self_attn.q_proj.weight", "U8", (2048, 1)),
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", "U8", (4, 64, 2, 16)),
        ("conv.weight", "F16", (64, 3, 16, 16)),
        ("model.norm.weight", "F32", (64, 64)),
    ],
)
def test_a_tensor_that_no_rule_knows_is_reported_and_refused(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    plan = make_plan({name: (dtype, shape), "model.embed_tokens.weight": ("F32", (97, 64))}, LLAMA)
    assert [tensor.name for tensor in plan.unknown] == [name]
    with pytest.raises(PlanError, match="no rule knows this tensor") as raised:
        plan.require_known()
    assert raised.value.where == name and raised.value.hint


@pytest.mark.parametrize("shape", [(), (63,), (64, 2), (2, 64)])
def test_a_bias_that_does_not_fit_its_weight_is_unknown(shape: tuple[int, ...]) -> None:
    plan = make_plan({**DECODER, Q_BIAS: ("F32", shape)}, LLAMA)
    assert [tensor.name for tensor in plan.unknown] == [Q_BIAS]


def test_the_bias_of_an_unknown_weight_is_unknown() -> None:
    plan = make_plan(floats(mystery__weight=(64, 64), mystery__bias=(64,)), LLAMA)
    assert len(plan.unknown) == 2


def test_an_override_names_an_unknown_tensor() -> None:
    shapes = floats(mystery__weight=(32, 64), mystery__bias=(32,))
    plan = make_plan(shapes, LLAMA, overrides=rule(match="mystery.weight", role="linear"))
    plan.require_known()
    assert [(t.role, t.groups, t.units) for t in plan.tensors] == [
        ("linear", ("mystery.weight",), 32),
        ("bias", ("mystery.weight",), 32),
    ]


@pytest.mark.parametrize("dtype", ["F64", "F8_E4M3", "F8_E5M2"])
def test_weights_in_other_float_formats_are_refused(dtype: str) -> None:
    with pytest.raises(PlanError, match=f"dtype {dtype} is not supported"):
        make_plan({Q: (dtype, (64, 64))}, LLAMA)


def test_a_checkpoint_quantized_by_another_method_is_refused() -> None:
    with pytest.raises(PlanError, match="quantized with gptq"):
        make_plan(DECODER, {**LLAMA, "quantization_config": {"quant_method": "gptq"}})


def test_an_empty_weight_is_refused() -> None:
    with pytest.raises(PlanError, match="empty"):
        make_plan({Q: ("F32", (0, 64))}, LLAMA)


def test_an_unknown_axis_is_refused() -> None:
    with pytest.raises(PlanError, match="unknown axis"):
        make_plan(DECODER, LLAMA, axis="row")


@pytest.mark.parametrize("config", [None, {}, {"model_type": ["gpt2"]}, {"text_config": "x", "model_type": None}])
def test_an_odd_config_is_no_crash(config: dict[str, Any] | None) -> None:
    assert by_name(make_plan(DECODER, config))[Q].role == "linear"
    assert make_plan(DECODER, config).skip_modules(config)


# ---------------------------------------------------------------- ties


def test_tied_copies_share_one_group_when_both_are_stored() -> None:
    plan = by_name(make_plan(DECODER, {"model_type": "gemma", "tie_word_embeddings": True}))
    assert plan[EMBEDDING].groups == plan[HEAD].groups == (EMBEDDING,)
    assert plan[EMBEDDING].axis == plan[HEAD].axis == "column"


def test_a_config_that_does_not_speak_of_tying_counts_as_tied() -> None:
    plan = by_name(make_plan(DECODER, {"model_type": "llama"}))
    assert plan[EMBEDDING].groups == plan[HEAD].groups


def test_a_config_that_unties_gives_two_groups() -> None:
    plan = by_name(make_plan(DECODER, LLAMA))
    assert plan[EMBEDDING].groups == (EMBEDDING,) and plan[HEAD].groups == (HEAD,)


def test_the_text_part_of_a_composite_config_may_untie() -> None:
    plan = by_name(make_plan(DECODER, {"model_type": "x", "text_config": {"tie_word_embeddings": False}}))
    assert plan[HEAD].groups == (HEAD,)


def test_tensors_of_different_shapes_are_never_tied() -> None:
    plan = by_name(make_plan({**DECODER, HEAD: ("F32", (99, 64))}, {"model_type": "llama"}))
    assert plan[HEAD].groups == (HEAD,)


@pytest.mark.parametrize(("tied", "groups"), [(True, 1), (False, 2)])
def test_the_copies_of_an_input_embedding_are_one_whatever_the_config_says(tied: bool, groups: int) -> None:
    shapes = floats(
        decoder__embed_tokens__weight=(97, 64),
        encoder__embed_tokens__weight=(97, 64),
        lm_head__weight=(97, 64),
        shared__weight=(97, 64),
    )
    plan = make_plan(shapes, {"model_type": "t5", "tie_word_embeddings": tied})
    assert len(plan.groups()) == groups
    assert by_name(plan)["encoder.embed_tokens.weight"].groups == ("shared.weight",)


@pytest.mark.parametrize(
    ("config", "embedding", "output"),
    [
        ("bert", "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
        ("roberta", "roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
        ("distilbert", "distilbert.embeddings.word_embeddings.weight", "vocab_projector.weight"),
        ("electra", "electra.embeddings.word_embeddings.weight", "generator_lm_head.weight"),
        ("albert", "albert.embeddings.word_embeddings.weight", "predictions.decoder.weight"),
        ("modernbert", "model.embeddings.tok_embeddings.weight", "decoder.weight"),
        ("gpt2", "transformer.wte.weight", "lm_head.weight"),
        ("gpt_neox", "gpt_neox.embed_in.weight", "embed_out.weight"),
    ],
)
def test_every_masked_language_model_ties_its_decoder(config: str, embedding: str, output: str) -> None:
    plan = make_plan({output: ("F32", (97, 64)), embedding: ("F32", (97, 64))}, {"model_type": config})
    assert plan.groups() == {embedding: 64}
    assert {tensor.role for tensor in plan.tensors} == {"embedding", "head"}


def test_position_embeddings_of_the_same_shape_are_not_tied() -> None:
    shapes = floats(wte__weight=(64, 64), wpe__weight=(64, 64))
    assert make_plan(shapes, {"model_type": "gpt2"}).groups() == {"wte.weight": 64, "wpe.weight": 64}


@pytest.mark.parametrize("fields", [{"masked": False}, {"quantized": False}, {"role": "linear"}])
def test_one_copy_of_a_tied_tensor_cannot_be_treated_apart(fields: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="tied to"):
        make_plan(DECODER, {"model_type": "gemma"}, overrides=rule(match=HEAD, **fields))


# ---------------------------------------------------------------- axis


@pytest.mark.parametrize(
    ("axis", "weight", "bias"),
    [
        ("neuron", ("row", 64, (Q,)), ("row", 64, (Q,))),
        ("input", ("column", 48, (Q,)), (None, 0, ())),
        ("element", ("element", 64 * 48, (Q,)), ("element", 64, (Q_BIAS,))),
    ],
)
def test_the_axis_option_chooses_the_unit_of_linear_layers(axis: str, weight: object, bias: object) -> None:
    plan = by_name(make_plan(DECODER, LLAMA, axis=axis))
    assert (plan[Q].axis, plan[Q].units, plan[Q].groups) == weight
    assert (plan[Q_BIAS].axis, plan[Q_BIAS].units, plan[Q_BIAS].groups) == bias


@pytest.mark.parametrize(("axis", "found"), [("neuron", "column"), ("input", "row"), ("element", "element")])
def test_the_axis_option_turns_conv1d_the_other_way(planned: Planned, axis: str, found: str) -> None:
    assert by_name(planned("gpt2", axis=axis)[0])["transformer.h.0.mlp.c_fc.weight"].axis == found


@pytest.mark.parametrize("axis", MASK_AXES)
def test_the_axis_option_leaves_embeddings_heads_and_routers_alone(planned: Planned, axis: str) -> None:
    for tensor in planned("qwen3_moe", axis=axis)[0].tensors:
        if tensor.role in ("embedding", "head", "router"):
            assert tensor.axis == "column"


def test_single_weights_of_an_expert_stack_are_units_of_their_expert(planned: Planned) -> None:
    stack = by_name(planned("gpt_oss", axis="element")[0])["model.layers.0.mlp.experts.gate_up_proj"]
    assert stack.view == (4, 64, 256) and stack.units == 64 * 256 and len(stack.groups) == 4


# ---------------------------------------------------------------- overrides


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text(text)
    return path


def test_overrides_come_from_toml(tmp_path: Path) -> None:
    path = write(
        tmp_path, '[[rule]]\nmatch = "*.q_proj.weight"\nquantized = false\n[[rule]]\nmatch = "a"\nrole="norm"\n'
    )
    assert load_overrides(path) == {
        "rule": [{"match": "*.q_proj.weight", "quantized": False}, {"match": "a", "role": "norm"}]
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[rule]", "not valid TOML"),
        ("rules = []", "cannot hold 'rules'"),
        ('[rule]\nmatch = "a"', "array of tables"),
        ("rule = [1]", "must be a table"),
        ("[[rule]]\nmasked = false", "needs match"),
        ('[[rule]]\nmatch = ""\nmasked = false', "needs match"),
        ("[[rule]]\nmatch = 3\nmasked = false", "needs match"),
        ('[[rule]]\nmatch = "a"', "sets nothing"),
        ('[[rule]]\nmatch = "a"\nmaskd = false', "cannot hold 'maskd'"),
        ('[[rule]]\nmatch = "a"\nmasked = 0', "must be true or false"),
        ('[[rule]]\nmatch = "a"\nquantized = "no"', "must be true or false"),
        ('[[rule]]\nmatch = "a"\nrole = "conv2d"', "unknown role 'conv2d'"),
        ('[[rule]]\nmatch = "a"\nrole = "unknown"', "unknown role"),
        ('[[rule]]\nmatch = "a"\nrole = ["norm"]', "unknown role"),
    ],
)
def test_a_plan_file_that_makes_no_sense_is_refused_with_its_place(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(PlanError, match=says.replace("[", r"\[")) as raised:
        load_overrides(path)
    assert str(path) in str(raised.value)


def test_a_plan_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_bytes(b"\xff")
    with pytest.raises(PlanError, match="UTF-8"):
        load_overrides(path)


def test_a_missing_plan_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        load_overrides(tmp_path / "none.toml")


def test_a_rule_that_matches_nothing_is_refused() -> None:
    with pytest.raises(PlanError, match=r"'\*\.k_prj\.\*' fits no tensor"):
        make_plan(DECODER, LLAMA, overrides=rule(match="*.k_prj.*", masked=False))


def test_later_rules_win() -> None:
    overrides = {"rule": [{"match": "*", "quantized": False}, {"match": "*.q_proj.weight", "quantized": True}]}
    plan = by_name(make_plan(DECODER, LLAMA, overrides=overrides))
    assert plan[Q].quantized and not plan[HEAD].quantized


def test_fields_of_several_rules_add_up() -> None:
    overrides = {"rule": [{"match": Q, "quantized": False}, {"match": Q, "masked": False}]}
    found = one(DECODER, Q, LLAMA, overrides=overrides)
    assert not found.quantized and not found.masked and found.origin == "rules, rule 1, rule 2"


def test_what_an_override_sends_in_the_clear_shows_in_the_plan() -> None:
    plan = make_plan(DECODER, LLAMA, overrides=rule(match=Q, masked=False))
    cleared = {tensor.name: tensor.origin for tensor in plan.tensors if tensor.cleared}
    assert cleared == {Q: "rules, rule 1", Q_BIAS: "rules"}


@pytest.mark.parametrize("fields", [{"masked": False}, {"role": "norm"}, {"role": "buffer"}])
def test_a_clear_tensor_has_no_group(fields: dict[str, Any]) -> None:
    found = one(DECODER, Q, LLAMA, overrides=rule(match=Q, **fields))
    assert (found.masked, found.axis, found.groups, found.units) == (False, None, (), 0)


@pytest.mark.parametrize("role", ["norm", "bias", "buffer"])
def test_a_role_that_is_public_shows_as_cleared(role: str) -> None:
    assert one(DECODER, Q, LLAMA, overrides=rule(match=Q, role=role)).cleared


@pytest.mark.parametrize(("match", "role"), [(Q, "conv1d"), (EMBEDDING, "linear"), (HEAD, "linear")])
def test_a_role_that_contradicts_a_rule_is_never_packed(match: str, role: str) -> None:
    found = one(DECODER, match, LLAMA, overrides=rule(match=match, role=role))
    assert found.role == role and found.masked and not found.packable


def test_a_bias_can_be_left_in_the_clear_alone() -> None:
    plan = by_name(make_plan(DECODER, LLAMA, overrides=rule(match=Q_BIAS, masked=False)))
    assert plan[Q].masked and not plan[Q_BIAS].masked and plan[Q_BIAS].cleared


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"match": "model.norm.weight", "role": "linear"}, "role linear needs 2 dimensions"),
        ({"match": Q, "role": "expert_stack"}, "role expert_stack needs 3 dimensions"),
        ({"match": "model.norm.weight", "masked": True}, "no units of its own"),
        ({"match": "model.norm.weight", "quantized": True}, "no units of its own"),
        ({"match": Q_BIAS, "quantized": True}, "never quantized"),
    ],
)
def test_an_override_that_asks_for_the_impossible_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        make_plan(DECODER, LLAMA, overrides=rule(**fields))


# ---------------------------------------------------------------- digest


def test_the_digest_does_not_depend_on_order_dtype_or_quantization() -> None:
    backwards = {name: ("BF16", shape) for name, (_, shape) in reversed(DECODER.items())}
    quantized = {**LLAMA, "quantization_config": {"quant_method": "bitsandbytes"}}
    dense = make_plan(DECODER, LLAMA, overrides=rule(match=Q, quantized=False))
    assert make_plan(backwards, LLAMA).digest == make_plan(DECODER, LLAMA).digest
    assert make_plan(DECODER, quantized).digest == dense.digest == make_plan(DECODER, LLAMA).digest


@pytest.mark.parametrize("name", ["gemma", "t5"])
def test_the_digest_does_not_depend_on_shards(name: str, tmp_path: Path) -> None:
    whole, parts = build(name, tmp_path / "whole"), build(name, tmp_path / "parts", max_shard_size="40KB")
    assert len(list(parts.glob("*.safetensors"))) > 2
    digests = {make_plan(read_shapes(folder), read_config(folder)).digest for folder in (whole, parts)}
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("shapes", "config", "options"),
    [
        (DECODER, LLAMA, {"axis": "input"}),
        (DECODER, LLAMA, {"axis": "element"}),
        (DECODER, {"model_type": "llama"}, {}),
        (DECODER, LLAMA, {"overrides": {"rule": [{"match": Q, "masked": False}]}}),
        (DECODER, LLAMA, {"overrides": {"rule": [{"match": Q, "role": "conv1d"}]}}),
        ({**DECODER, Q: ("F32", (64, 49))}, LLAMA, {}),
        ({**DECODER, "model.layers.1.self_attn.q_proj.weight": ("F32", (64, 48))}, LLAMA, {}),
    ],
)
def test_the_digest_changes_with_whatever_decides_masks(shapes: Shapes, config: Any, options: Any) -> None:
    assert make_plan(shapes, config, **options).digest != make_plan(DECODER, LLAMA).digest


def test_the_digest_is_fixed_for_all_time() -> None:
    assert make_plan(DECODER, LLAMA).digest == "3fa8b98c503b8fcc694066423a9b03f038426b0e3140408cd053ab5ac8874743"


def test_the_axis_counts_even_where_no_tensor_feels_it() -> None:
    shapes = floats(wte__weight=(97, 64))
    assert len({make_plan(shapes, None, axis=axis).digest for axis in MASK_AXES}) == 3


@pytest.mark.parametrize(("kind", "role"), [("pegasus", "buffer"), ("roformer", "buffer"), ("bart", "embedding")])
def test_positions_that_nothing_trains_are_no_weights(kind: str, role: str) -> None:
    name = "model.encoder.embed_positions.weight"
    assert one({name: ("F32", (64, 64))}, name, {"model_type": kind}).role == role


# ---------------------------------------------------------------- skip list


def test_names_that_would_hit_a_packed_module_are_anchored(planned: Planned) -> None:
    plan, config = planned("distilbert")
    assert "^classifier$" in plan.skip_modules(config) and "classifier" not in plan.skip_modules(config)


def test_a_router_called_gate_leaves_gate_proj_packed() -> None:
    shapes = floats(
        layers__0__mlp__gate__weight=(4, 64),
        layers__0__mlp__gate_proj__weight=(64, 64),
        layers__0__mlp__shared_expert_gate__weight=(1, 64),
        layers__0__mlp__shared_expert__gate_proj__weight=(64, 64),
    )
    entries = make_plan(shapes, {"model_type": "qwen2_moe"}).skip_modules({"model_type": "qwen2_moe"})
    assert [any(fits(entry, name.removesuffix(".weight")) for entry in entries) for name in shapes] == [1, 0, 1, 0]


@pytest.mark.soak
def test_every_output_layer_that_transformers_ties_is_left_out() -> None:
    import transformers
    from transformers.models.auto import modeling_auto as auto

    missing = set()
    for names in (
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    ):
        for kind, head in names.items():
            tied = getattr(getattr(transformers, head), "_tied_weights_keys", None)
            entries = skip_modules([], {"model_type": kind})
            modules = {key.removesuffix(".weight") for key in tied or () if key.endswith(".weight")}
            missing |= {(kind, module) for module in modules if not any(fits(entry, module) for entry in entries)}
    others = {("whisper", "proj_out"), ("git", "output"), ("trocr", "output_projection")}  # not for text
    others.add(("luke", "entity_predictions.decoder"))
    assert {pair for pair in missing if not re.search("embed|shared", pair[1])} == others


def test_an_encoder_of_any_name_keeps_its_tied_output_layer() -> None:
    for kind, module in (("roformer", "cls.predictions.decoder"), ("longformer", "lm_head.decoder")):
        assert module in skip_modules([], {"model_type": kind})
    assert skip_modules([], None) == skip_modules([], {"model_type": "llama"}) == ["classification_head", *HEADS_OF_ALL]


HEADS_OF_ALL = ["classifier", "lm_head", "qa_outputs", "score"]


def test_ten_thousand_experts_need_one_entry(planned: Planned) -> None:
    plan, config = planned("mixtral")
    entries = plan.skip_modules(config)
    assert EXPERTS in entries and not any("experts." in entry for entry in entries)
    assert fits(EXPERTS, "model.layers.0.mlp.experts.17.w1") and not fits(EXPERTS, "model.layers.0.shared_experts.w1")


def test_our_reading_of_an_entry_is_that_of_transformers() -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    names = ["a", "a.b", "b.a", "ab", "a.bc", "x.a.b", "a.b.c", "axb"]
    for entry in ["a", "a.b", "^a$", "^a\\.b$", ".*\\.a", "b", "", "a."]:
        assert [fits(entry, name) for name in names] == [not should_convert_module(name, [entry]) for name in names]


_WORDS = st.sampled_from(["a", "ab", "b", "gate", "gate_proj", "classifier", "dense", "0", "1", "11", "lm_head", "a(b"])
_PATHS = st.lists(_WORDS, min_size=1, max_size=4).map(".".join)


@given(st.dictionaries(_PATHS, st.booleans(), min_size=1, max_size=12))
def test_the_skip_list_hits_every_dense_linear_and_no_packed_one(packed: dict[str, bool]) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    model = one(DECODER, Q, LLAMA)
    tensors = [dataclasses.replace(model, name=f"{path}.weight", packable=flag) for path, flag in packed.items()]
    entries = skip_modules(tensors, None)
    assert {path: should_convert_module(path, entries) for path in packed} == packed
