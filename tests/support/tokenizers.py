"""Small tokenizers of the kinds that people have, trained on a few sentences."""

from __future__ import annotations

from functools import cache
from typing import Any

SENTENCES = [
    "2+2=4, 3+4=7 and 12-5=7.",
    "the quick brown fox jumps over the lazy dog; hello world, hello there!",
    "user says: What is it? assistant says: It is a fox. system says: be brief",
    "name[The Eagle], food[Italian] is a pub near the river",
    "Ünïcödé is fine, too: été, naïve, 世界",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", "<|im_start|>", "<|im_end|>"]
KINDS = (
    "metaspace-always",
    "metaspace-first",
    "prepended",
    "unigram",
    "byte-level",
    "byte-level-trimmed",
    "word-piece",
)


@cache
def _trained(kind: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    if kind == "word-piece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
        trainer = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
    elif kind == "prepended":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=900, special_tokens=[*SPECIAL, *bytes_], max_token_length=8, show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=False))
        alphabet: list[str] = []
        if kind.startswith("metaspace"):
            scheme = kind.removeprefix("metaspace-")
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
            tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            tokenizer.post_processor = processors.ByteLevel(trim_offsets=kind.endswith("trimmed"))
            alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if kind.startswith(("metaspace", "prepended", "unigram")):
        single, pair = ("$A </s>", "$A </s> $B </s>") if kind == "unigram" else ("<s> $A", "<s> $A $B")
        specials = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=specials)
    return tokenizer


def tokenizer(kind: str, **options: Any) -> Any:
    """A tokenizer of transformers.

    Those with metaspaces put <s> before a text, as Llama's does; "prepended" is made of the parts of Llama 2's, and
    "unigram" of those of T5's, which puts </s> behind a text.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(kind).to_str()),
        **{"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"},
        **{"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]},
        **options,
    )
