"""The tokenizer of a checkpoint, from its own files only, which may be a stranger's."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedqsn_cli.checkpoint import Checkpoint
from fedqsn_cli.checkpoint.companions import MAX_COMPANION_BYTES
from fedqsn_cli.checkpoint.files import read_file
from fedqsn_cli.errors import InputError
from fedqsn_cli.models.architecture import has_tokenizer
from fedqsn_cli.models.child_process import in_child
from fedqsn_cli.models.messages import first_line, quiet

_DESCRIPTION = "tokenizer.json"
_BEFORE_MODEL = ("normalizer", "pre_tokenizer")
_SWITCHES = ("fuse_unk", "byte_fallback", "ignore_merges")  # of the model
_SECONDS_TO_LOAD = 30  # a tokenizer of 33 MB takes two


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer of a checkpoint, from its own files only; None if it has none.

    Raises:
        InputError: its files cannot be used, or they need code from elsewhere.
    """
    if not has_tokenizer(checkpoint):
        return None
    path = checkpoint.path
    with quiet():
        _try_tokenizer(path, _state(path))
        return _tokenizer(path)


def _state(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    """What changes whenever a file in a folder does, whatever times it is given."""
    found = [(entry.name, entry.stat()) for entry in os.scandir(folder) if entry.is_file()]
    return tuple(sorted((name, status.st_ino, status.st_size, status.st_ctime_ns) for name, status in found))


@lru_cache(maxsize=64)
def _try_tokenizer(path: Path, state: tuple[tuple[str, int, int, int], ...]) -> None:
    """Load a tokenizer in a child process, once while its folder stays as it is. Raises InputError."""
    in_child(lambda: _tried(path), what="loading the tokenizer", where=path, seconds=_SECONDS_TO_LOAD)


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        loaded = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        described = _described(path)
        if described is None or not hasattr(loaded, "backend_tokenizer"):
            return loaded
        if described["model"].get("type", _kind(loaded)) != _kind(loaded):  # class and special tokens are not its own
            return PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        if _steps(described) != _steps(_made(loaded)):
            _restore(loaded, path / _DESCRIPTION)
        return loaded
    except MemoryError:
        raise
    except BaseException as error:  # its files may hold anything, and Rust code panics with no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise InputError(f"the tokenizer cannot be loaded ({first_line(error)})", where=path) from None


def _described(folder: Path) -> dict[str, Any] | None:
    """What tokenizer.json says of a tokenizer, None without it.

    transformers makes a tokenizer by the model's class, whatever that file describes: of a Qwen2 with a word-level
    tokenizer a BPE without merges, which finds no word in any text; of a GPT2 with Llama's one that splits words as
    GPT2's does.
    """
    file = folder / _DESCRIPTION
    return json.loads(read_file(file, MAX_COMPANION_BYTES)) if file.is_file() else None


def _kind(loaded: Any) -> str:
    """Of the model of a tokenizer: BPE, Unigram, WordPiece or WordLevel."""
    return type(loaded.backend_tokenizer.model).__name__


def _made(loaded: Any) -> dict[str, Any]:
    """What a tokenizer does with a text, but for the words and special tokens, in the form of tokenizer.json."""
    made = loaded.backend_tokenizer
    parts = {name: getattr(made, name) for name in _BEFORE_MODEL}
    before = {name: json.loads(part.__getstate__()) for name, part in parts.items() if part is not None}
    return {**before, "model": {name: getattr(made.model, name, False) for name in _SWITCHES}}


def _steps(description: Mapping[str, Any]) -> list[list[str]]:
    """What is done with a text, one kind after the other; other settings may come from tokenizer_config.json."""
    switches = [name for name in _SWITCHES if description["model"].get(name)]
    return [*(_kinds(description.get(name)) for name in _BEFORE_MODEL), switches]


def _kinds(part: Mapping[str, Any] | None) -> list[str]:
    if part is None:
        return []
    parts = part.get("normalizers", part.get("pretokenizers"))
    return [part["type"]] if parts is None else [kind for one in parts for kind in _kinds(one)]


def _restore(loaded: Any, file: Path) -> None:
    """Let a tokenizer do with texts what tokenizer.json describes; special tokens stay those of its class."""
    from tokenizers import Tokenizer, processors

    made, described = loaded.backend_tokenizer, Tokenizer.from_file(str(file))
    for name in (*_BEFORE_MODEL, "model", "decoder"):
        setattr(made, name, getattr(described, name))
    if not isinstance(described.post_processor, processors.ByteLevel | None):  # it puts special tokens around a text
        made.post_processor = described.post_processor


def _tried(path: Path) -> None:
    """Load a tokenizer and ask what everybody asks it. Raises InputError for one that knows no word."""
    tokenizer = _tokenizer(path)
    try:
        words = tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)
        tokenizer("text")
        len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id, int(tokenizer.model_max_length)
    except MemoryError:
        raise
    except BaseException as error:
        raise InputError(f"the tokenizer cannot be used ({first_line(error)})", where=path) from None
    if not words:
        hint = "add the file of its vocabulary to the folder"
        raise InputError("the tokenizer knows no word but special tokens", where=path, hint=hint)
