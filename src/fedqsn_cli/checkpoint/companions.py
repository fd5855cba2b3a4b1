"""The files that belong to a model beside its weights: those of its tokenizer, its chat template, its generation."""

from __future__ import annotations

import os
from pathlib import Path

from fedqsn_cli.checkpoint.files import check_size
from fedqsn_cli.checkpoint.header import is_plain_file_name
from fedqsn_cli.errors import InputError

MAX_COMPANION_BYTES = 256 << 20
"""The largest tokenizer.json of well-known models has 33 MB."""

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "spm.model",
    "bpe.codes",
    "vocab.bpe",
    "source.spm",
    "target.spm",
    "tekken.json",
    "*.tiktoken",
)
"""All of them, in the order in which they are written. A star stands for any beginning."""

_WITHOUT_WORDS = frozenset(
    {
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "merges.txt",
        "generation_config.json",
        "chat_template.jinja",
        "chat_template.json",
    }
)

MANIFESTS = ("fedqsn.json", "proxy.json", "update.json", "partial.json")
"""Those of fedqsn itself: a directory that holds one is ours to replace."""

_OURS = ("config.json", *MANIFESTS)
_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt", ".pkl")
_ABOUT = (".md", ".txt", ".png", ".jpg", ".pdf")  # what people read; vocabularies have names of their own


def is_companion(name: str) -> bool:
    """Whether a file of that name goes with a model."""
    return name in COMPANIONS or name.endswith(".tiktoken")


def is_vocabulary(name: str) -> bool:
    """Whether a companion holds the words of a tokenizer."""
    return is_companion(name) and name not in _WITHOUT_WORDS


def find_companions(folder: Path) -> list[Path]:
    """The companions in a folder, in the order of `COMPANIONS`.

    Raises:
        InputError: one of them is not a plain file, or has a name that no artifact takes. FormatError: it is larger
            than any that is known.
    """
    names = [name for pattern in COMPANIONS for name in _matching(folder, pattern)]
    found = [folder / name for name in names]
    for path in found:
        if not is_plain_file_name(path.name):
            raise InputError("has a name that is not taken", where=path, hint="rename it")
        check_size(path, MAX_COMPANION_BYTES)
    return found


def _matching(folder: Path, pattern: str) -> list[str]:
    if not pattern.startswith("*"):
        return [pattern] if os.path.lexists(folder / pattern) else []
    return sorted(path.name for path in folder.glob(pattern))


def left_behind(folder: Path) -> list[str]:
    """Names of files that no command carries along, though they are neither weights nor a text about the model."""
    if not folder.is_dir():
        return []
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file()
        and not is_companion(path.name)
        and path.name not in _OURS
        and not path.name.startswith((".", "LICENSE", "NOTICE"))
        and not path.name.endswith((*_WEIGHTS, *_ABOUT))
    )
