"""The tokenizer of a checkpoint, from its own files only, which may be a stranger's."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedqsn_cli.checkpoint import Checkpoint
from fedqsn_cli.errors import InputError
from fedqsn_cli.models.architecture import has_tokenizer
from fedqsn_cli.models.child_process import in_child
from fedqsn_cli.models.messages import first_line, quiet

_KIND = re.compile(rb'"model"\s*:\s*\{\s*"type"\s*:\s*"(\w+)"')  # of a tokenizer, as its library writes it
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
        if _is_of_another_kind(loaded, path):
            return PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        return loaded
    except MemoryError:
        raise
    except BaseException as error:  # its files may hold anything, and Rust code panics with no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise InputError(f"the tokenizer cannot be loaded ({first_line(error)})", where=path) from None


def _is_of_another_kind(loaded: Any, folder: Path) -> bool:
    """Did transformers make a tokenizer by the model's class that tokenizer.json does not describe?

    Of a Qwen2 with a word-level tokenizer it makes a BPE without merges, which finds no word in any text.
    """
    made, file = getattr(loaded, "backend_tokenizer", None), folder / "tokenizer.json"
    if made is None or not file.is_file():
        return False
    described = _KIND.search(file.read_bytes())
    return described is not None and described[1].decode() != type(made.model).__name__


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
