"""What can be said of a tokenizer from its files alone, without the library that runs it: is it of any use?"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedqsn_cli import strictjson
from fedqsn_cli.checkpoint.companions import MAX_COMPANION_BYTES, is_vocabulary
from fedqsn_cli.checkpoint.files import read_file
from fedqsn_cli.errors import FormatError

# Tokenizers whose words are bytes or characters: they have no vocabulary file.
_WITHOUT_VOCABULARY = ("ByT5", "Canine", "Perceiver", "CharacterBERT")


def tokenizer_problem(companions: Iterable[Path], rows: int | None) -> str | None:
    """Why texts cannot be tokenized for a model, as one clause; None where nothing is known to be wrong.

    Args:
        companions: files beside the model. rows: tokens that its input embedding has, None if that is not known.

    Raises:
        FormatError: tokenizer.json or tokenizer_config.json is malformed.
    """
    files = {path.name: path for path in companions}
    if not files.keys() - {"generation_config.json"}:
        return "it has no tokenizer"
    if not any(is_vocabulary(name) for name in files):
        named = _document(files.get("tokenizer_config.json")).get("tokenizer_class")
        if isinstance(named, str) and named.startswith(_WITHOUT_VOCABULARY):
            return None
        return f"its tokenizer ({named or 'of no class'}) has no vocabulary file"
    return _problem_of_words(_document(files.get("tokenizer.json")), rows)


def _document(path: Path | None) -> Mapping[str, Any]:
    """A JSON object; empty where there is no file, or something else is in it."""
    if path is None:
        return {}
    document = strictjson.loads(read_file(path, MAX_COMPANION_BYTES), path)
    if not isinstance(document, dict):
        raise FormatError("not a JSON object", where=path)
    return document


def _problem_of_words(tokenizer: Mapping[str, Any], rows: int | None) -> str | None:
    """What is wrong with the words that a tokenizer.json holds."""
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    words = _numbered(model.get("vocab") if isinstance(model, Mapping) else None)
    special = {
        entry["content"]: entry["id"]
        for entry in (added if isinstance(added, list) else [])
        if isinstance(entry, Mapping) and isinstance(entry.get("content"), str) and type(entry.get("id")) is int
    }
    if words is not None and not words.keys() - special.keys():
        return "its tokenizer knows no word but special tokens"
    last = max([*(words or {}).values(), *special.values()], default=0)
    if rows is not None and last >= rows:
        return f"its tokenizer has ids up to {last}, but the model only {rows} tokens"
    return None


def _numbered(vocabulary: object) -> dict[str, int] | None:
    """Id by word, of a vocabulary that is an object, or a list of words with their scores; None for anything else."""
    if isinstance(vocabulary, Mapping):
        return {word: number for word, number in vocabulary.items() if type(number) is int}
    if isinstance(vocabulary, list):
        words = [entry[0] if isinstance(entry, list) and entry else json.dumps(entry) for entry in vocabulary]
        return {str(word): number for number, word in enumerate(words)}
    return None
