"""Files that may leave the owner: config and companion files without anything private."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedqsn_cli import strictjson
from fedqsn_cli.checkpoint.companions import MAX_COMPANION_BYTES
from fedqsn_cli.checkpoint.files import read_file
from fedqsn_cli.errors import FormatError

# Fields in which libraries record where a file was or who wrote it. None of them changes how a model computes.
PRIVATE_FIELDS = frozenset(
    {
        "_name_or_path",
        "name_or_path",
        "_commit_hash",
        "_original_object_hash",
        "special_tokens_map_file",
        "tokenizer_file",
        "vocab_file",
        "merges_file",
        "base_model_name_or_path",
        "_from_auto",
        "auto_map",
    }
)
_WORDS = (
    r"seeds?|rng|manual_seed|host|host_?name|machine|node_name|user|user_?name|author|login|cwd|home|hf_token|api_key|"
    r"secret|password|private_key|(?:job|mask|master|secret)_key|key|created|created_at|timestamp|time|date|datetime|"
    r"mtime|ctime|started_at|finished_at|exported_at|clients?"
)
PRIVATE_NAME = re.compile(rf"(?:{_WORDS})|.*_(?:seeds?|timestamp|hostname|username)|seed_.*", re.IGNORECASE)
"""Names of fields in which people and tools keep secrets, seeds, names of machines and times."""
JSON_COMPANIONS_TO_CLEAN = frozenset(
    {"tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "added_tokens.json"}
)
# Fields that a model needs and clients see anyway; names of labels and tokens may look like paths.
PUBLIC_FIELDS = frozenset({"id2label", "label2id", "added_tokens_decoder", "chat_template"})
_ABSOLUTE_PATH = re.compile(r"(?:/[^/\n]+){2,}/?|[A-Za-z]:\\.+|~/.+|\\\\[^\\]+\\.+|file://.*")
_TOKENIZER_PARTS = frozenset({"normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding"})
_MAY_BE_PRIVATE = re.compile(rb"/(?:home|Users|root|mnt|tmp|var|data|opt|srv)/|file://|[A-Za-z]:\\\\|\"~/")
_HOME = re.compile(r"/home/|/Users/|/root/|[A-Za-z]:\\Users\\")  # anywhere in a text


def public_config(config: Mapping[str, Any], quantization: dict[str, Any] | None) -> bytes:
    """The config.json of a proxy: without private fields, with the quantization of its weights.

    Args:
        config: the owner's config.json.
        quantization: `quantization_config` for packed weights, None for dense ones.
    """
    document = clean(config)
    document.pop("quantization_config", None)
    if quantization is not None:
        document["quantization_config"] = quantization
    return strictjson.pretty(document).encode()


def public_companion(path: Path) -> bytes:
    """A tokenizer or generation file as it may leave the owner.

    Raises:
        FormatError: it should be a JSON object, but is not.
    """
    data = read_file(path, MAX_COMPANION_BYTES)
    if path.name == "tokenizer.json":
        return _public_tokenizer(data, path)
    if path.name not in JSON_COMPANIONS_TO_CLEAN:
        return data
    return strictjson.pretty(clean(_object(data, path))).encode()


def _public_tokenizer(data: bytes, path: Path) -> bytes:
    """As it is, unless there is something private in it; fields that no tokenizer has are left out then.

    Raises:
        FormatError: a part that tells how text is tokenized holds it.
    """
    if _MAY_BE_PRIVATE.search(data) is None:
        return data
    document = _object(data, path)
    words = {name: document[name] for name in ("model", "added_tokens") if name in document}
    rest = {name: part for name, part in document.items() if name not in words}
    cleaned = clean(rest)
    for name in sorted(_TOKENIZER_PARTS & rest.keys()):
        if cleaned.get(name) != rest[name]:
            raise FormatError(f"field {name} holds an absolute path", where=path, hint="remove it from the file")
    return data if cleaned == rest else strictjson.pretty(words | cleaned).encode()


def _object(data: bytes, path: Path) -> dict[str, Any]:
    document = strictjson.loads(data, path)
    if not isinstance(document, dict):
        raise FormatError("not a JSON object", where=path)
    return document


def clean(document: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object without private fields, and without text that is an absolute path or names a home directory."""
    return {
        key: value if key in PUBLIC_FIELDS else _clean(value)
        for key, value in document.items()
        if key in PUBLIC_FIELDS or not (_is_private(key, value) or _is_path(value))
    }


def _is_private(key: str, value: Any) -> bool:
    """Is a field left out? An object under a private name is looked into."""
    by_name = PRIVATE_NAME.fullmatch(key) is not None and not isinstance(value, Mapping)
    return key in PRIVATE_FIELDS or by_name or _is_path(key)


def _clean(value: Any) -> Any:
    if isinstance(value, Mapping):
        return clean(value)
    return [_clean(item) for item in value if not _is_path(item)] if isinstance(value, list) else value


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and bool(_ABSOLUTE_PATH.fullmatch(value) or _HOME.search(value))
