"""Tiny random checkpoints of every model family that fedqsn knows: hidden size 64, 2 layers, vocabulary of 97.

build("bert", tmp_path)                              # the family's first head
build("t5", tmp_path, head="T5ForSequenceClassification", dtype="bfloat16", max_shard_size="50KB")
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HIDDEN, INNER, LAYERS, ATTENTION_HEADS, VOCABULARY, POSITIONS, LABELS = 64, 128, 2, 4, 97, 64, 5

_COMMON = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": ATTENTION_HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 16}


@dataclass(frozen=True)
class Family:
    """How to build one family: the config class, its arguments, and the model classes (the first is the default)."""

    config: str
    heads: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    common: bool = True

    @property
    def arguments(self) -> dict[str, Any]:
        return ({**_COMMON} if self.common else {}) | self.options


def _bert_like(name: str, **options: Any) -> Family:
    return Family(f"{name}Config", (f"{name}ForSequenceClassification", f"{name}ForMaskedLM"), options)


def _llama_like(name: str, *, config: str = "", more: tuple[str, ...] = (), **options: Any) -> Family:
    return Family(config or f"{name}Config", (f"{name}ForCausalLM", *more), options)


def _t5_like(name: str, more: tuple[str, ...] = (), **options: Any) -> Family:
    sizes = {"d_model": HIDDEN, "d_kv": 16, "d_ff": INNER, "num_layers": LAYERS, "num_heads": ATTENTION_HEADS}
    options = {**sizes, "vocab_size": VOCABULARY, "decoder_start_token_id": 0, **options}
    return Family(f"{name}Config", (f"{name}ForConditionalGeneration", *more), options, common=False)


FAMILIES: dict[str, Family] = {
    "bert": _bert_like("Bert"),
    "roberta": _bert_like("Roberta"),
    "distilbert": Family(
        "DistilBertConfig",
        ("DistilBertForSequenceClassification", "DistilBertForMaskedLM"),
        {
            "dim": HIDDEN,
            "hidden_dim": INNER,
            "n_layers": LAYERS,
            "n_heads": ATTENTION_HEADS,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": POSITIONS,
        },
        common=False,
    ),
    "electra": _bert_like("Electra", embedding_size=32),
    "albert": _bert_like("Albert", embedding_size=32),
    "deberta-v2": _bert_like(
        "DebertaV2", relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"], share_att_key=False
    ),
    "modernbert": _bert_like("ModernBert", cls_token_id=1, sep_token_id=2),
    "longformer": Family(
        "LongformerConfig", ("LongformerForMaskedLM",), {"attention_window": [8, 8], "sep_token_id": 2}
    ),
    "gpt2": Family(
        "GPT2Config",
        ("GPT2LMHeadModel", "GPT2ForSequenceClassification"),
        {
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": ATTENTION_HEADS,
            "vocab_size": VOCABULARY,
            "n_positions": POSITIONS,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        common=False,
    ),
    "gpt_neox": Family("GPTNeoXConfig", ("GPTNeoXForCausalLM", "GPTNeoXForSequenceClassification")),
    "opt": Family(
        "OPTConfig",
        ("OPTForCausalLM", "OPTForSequenceClassification"),
        {
            "hidden_size": HIDDEN,
            "ffn_dim": INNER,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": ATTENTION_HEADS,
            "vocab_size": VOCABULARY,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": POSITIONS,
            "pad_token_id": 0,
        },
        common=False,
    ),
    "bloom": Family(
        "BloomConfig",
        ("BloomForCausalLM", "BloomForSequenceClassification"),
        {
            "hidden_size": HIDDEN,
            "n_layer": LAYERS,
            "n_head": ATTENTION_HEADS,
            "vocab_size": VOCABULARY,
            "pad_token_id": 0,
        },
        common=False,
    ),
    "falcon": Family(
        "FalconConfig",
        ("FalconForCausalLM", "FalconForSequenceClassification"),
        {
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": ATTENTION_HEADS,
            "vocab_size": VOCABULARY,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        common=False,
    ),
    "llama": _llama_like("Llama", more=("LlamaForSequenceClassification",)),
    "qwen2": _llama_like("Qwen2", more=("Qwen2ForSequenceClassification",), num_key_value_heads=2),
    "qwen3": _llama_like("Qwen3", more=("Qwen3ForSequenceClassification",), **_GROUPED),
    "qwen3_moe": _llama_like("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, **_GROUPED),
    "mistral": _llama_like("Mistral", num_key_value_heads=2),
    "gemma": _llama_like("Gemma", **_GROUPED),
    "gemma2": _llama_like("Gemma2", **_GROUPED),
    "gemma3": _llama_like("Gemma3", config="Gemma3TextConfig", **_GROUPED),
    "phi": _llama_like("Phi"),
    "phi3": _llama_like("Phi3"),
    "t5": _t5_like("T5", ("T5ForSequenceClassification",), feed_forward_proj="gated-gelu"),
    "longt5": _t5_like("LongT5", encoder_attention_type="transient-global", global_block_size=8),
    "pegasus": Family(
        "PegasusConfig",
        ("PegasusForConditionalGeneration",),
        {
            "d_model": HIDDEN,
            "encoder_layers": LAYERS,
            "decoder_layers": LAYERS,
            "encoder_attention_heads": ATTENTION_HEADS,
            "decoder_attention_heads": ATTENTION_HEADS,
            "encoder_ffn_dim": INNER,
            "decoder_ffn_dim": INNER,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": POSITIONS,
            "pad_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
        },
        common=False,
    ),
    "deepseek_v3": _llama_like(
        "DeepseekV3",
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    ),
    "mixtral": _llama_like("Mixtral", num_key_value_heads=2, num_local_experts=4),
    "gpt_oss": _llama_like("GptOss", num_local_experts=4, num_experts_per_tok=2, **_GROUPED),
}

EVERY_HEAD = [(name, head) for name, family in FAMILIES.items() for head in family.heads]

REPRESENTATIVE = {  # every way in which a family stores or ties its weights; the others are variations
    "BertForSequenceClassification",  # an encoder with a pooler
    "BertForMaskedLM",  # tied, with a bias of its own
    "GPT2LMHeadModel",  # transposed weights, fused attention, tied
    "LlamaForCausalLM",  # grouped attention, nothing tied
    "LlamaForSequenceClassification",  # a decoder that classifies
    "Phi3ForCausalLM",  # fused gate and up projections
    "MixtralForCausalLM",  # experts that a file holds one by one and transformers stacks
    "GptOssForCausalLM",  # experts in one tensor, with biases
    "T5ForConditionalGeneration",  # two towers that share their embedding
    "T5ForSequenceClassification",
}


def rest_in_soak(heads: Iterable[tuple[str, str]] = EVERY_HEAD, fast: Collection[str] = REPRESENTATIVE) -> list[Any]:
    """Cases (name, head) of a test: those of `fast` for `make test`, all others for `make soak`."""
    import pytest

    return [pytest.param(name, head, marks=[] if head in fast else [pytest.mark.soak]) for name, head in heads]


def make_config(name: str, head: str | None = None, **options: Any) -> Any:
    """A transformers config of a family; options override its arguments, and `labels` the number of outputs."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    family = FAMILIES[name]
    labels = options.pop("labels", LABELS)
    config = getattr(transformers, family.config)(**{**family.arguments, **options})
    head = head or family.heads[0]
    if "Classification" in head and "id2label" not in options:
        config.num_labels = labels
    config.architectures = [head]
    return config


def build(
    name: str,
    folder: str | Path,
    *,
    dtype: str = "float32",
    head: str | None = None,
    max_shard_size: str | None = None,
    seed: int = 0,
    tokenizer: bool = False,
    **options: Any,
) -> Path:
    """Write a tiny random checkpoint and return its directory.

    Args:
        folder: made if missing; the checkpoint is written into it.
        dtype: float32, float16 or bfloat16.
        head: a model class of the family; None takes the first.
        max_shard_size: for example "50KB", to get shards and an index.
        tokenizer: also write a word-level tokenizer of 97 words (w3 ... w96).
        options: arguments of the family's config class.
    """
    config = make_config(name, head, **options)
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = getattr(transformers, config.architectures[0])(config)
    _fill(model)
    torch.set_rng_state(generator_state)
    shards = {"max_shard_size": max_shard_size} if max_shard_size else {}
    model.to(getattr(torch, dtype)).save_pretrained(folder, **shards)
    if tokenizer:
        write_tokenizer(Path(folder))
    return Path(folder)


def read_shapes(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """name -> (safetensors dtype, shape) of a checkpoint directory, in reading order, as make_plan wants it."""
    from fedqsn_cli.checkpoint import Checkpoint

    with Checkpoint.open(folder) as checkpoint:
        return {name: (entry.dtype, entry.shape) for name, entry in checkpoint.entries.items()}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint directory."""
    return dict(json.loads((folder / "config.json").read_text()))


def _fill(model: Any) -> None:
    """Give biases and norms values too: zeros and ones would let a wrong tensor pass for the right one."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)


def write_tokenizer(folder: Path) -> None:
    """A word-level tokenizer of 97 words: [PAD], [UNK], [EOS], w3 ... w96."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[PAD]": 0, "[UNK]": 1, "[EOS]": 2} | {f"w{index}": index for index in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=POSITIONS
    )
    fast.save_pretrained(folder)
