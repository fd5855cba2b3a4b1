"""Checkpoints that transformers opens and trains: tiny, with a tokenizer of 97 words, w3 ... w96."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from golden.inputs import noise
from support.raw_safetensors import read_model, to_bits, write_file

VOCABULARY, POSITIONS, LABELS = 97, 64, 5
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMMON: dict[str, Any] = IDS | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
}
GPT2: dict[str, Any] = IDS | {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": VOCABULARY,
    "n_positions": POSITIONS,
}
EXPERTS = {"num_local_experts": 4, "num_key_value_heads": 2}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {  # config class, model class, arguments of the config
    "bert": ("BertConfig", "BertForSequenceClassification", COMMON | {"num_labels": LABELS}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "llama": ("LlamaConfig", "LlamaForCausalLM", COMMON),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", COMMON | EXPERTS),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", COMMON | EXPERTS | {"num_experts_per_tok": 2, "head_dim": 16}),
}
HEADS = ("classifier", "score", "lm_head")


def model(folder: str, family: str, *, seed: int = 0) -> None:
    """Write a checkpoint. Its weights are drawn by numpy: torch draws others on other machines."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config, kind, arguments = FAMILIES[family]
    made = getattr(transformers, kind)(getattr(transformers, config)(**arguments, architectures=[kind]))
    made.save_pretrained(folder)
    tensors = read_model(Path(folder))
    for name, (dtype, bits) in tensors.items():
        if dtype == "F32":
            around = 1 if re.search(r"norm.*weight$|ln_.*weight$", name, re.IGNORECASE) else 0
            values = noise(seed, 0.5 if name.startswith(HEADS) else 0.1)(name, bits.shape) + around
            tensors[name] = (dtype, to_bits(values, dtype))
    write_file(Path(folder, "model.safetensors"), tensors, {"format": "pt"})
    _write_tokenizer(Path(folder))


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[PAD]": 0, "[UNK]": 1, "[EOS]": 2} | {f"w{index}": index for index in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=POSITIONS
    )
    fast.save_pretrained(folder)
