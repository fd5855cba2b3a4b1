"""FQ006: what must not be in any byte of a proxy, and how it is recognised.

    key         the job's key, or the seed of one of its groups: raw, hexadecimal, base64 (raw only for the key itself)
    seed        a field that is called seed, or like one
    path        an absolute path; fields in which libraries note one
    machine     this machine's host name or user name; fields called host, user, ...
    time        a date with a clock time, or a number of seconds since 1970
    metadata    fields in the header of a safetensors file that exports do not write

How files are spelled (white space, order, padding) is not looked at: FQ012 compares every byte.

Vocabularies and label names are public text and are searched for the key only. Messages name the file and the field,
never what is in it.
"""

from __future__ import annotations

import base64
import contextlib
import getpass
import json
import re
import socket
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from fedqsn_cli import strictjson
from fedqsn_cli.artifacts.manifests import PROXY_MANIFEST, VISIBLE_TENSORS
from fedqsn_cli.artifacts.sanitize import PRIVATE_FIELDS, PRIVATE_NAME
from fedqsn_cli.auditing.inputs import KEY, PROXY
from fedqsn_cli.auditing.registry import Rule
from fedqsn_cli.checkpoint.companions import is_companion
from fedqsn_cli.checkpoint.files import open_regular_file
from fedqsn_cli.errors import FormatError
from fedqsn_cli.masks.draw import SERVER, seed
from fedqsn_cli.masks.job_key import JobKey

_ROOTS = (
    "home|Users|root|mnt|tmp|var|data|opt|srv|work|workspace|scratch|content|private|media|usr|etc|nfs|gpfs|lustre|"
    "shared"
)
_PATH = re.compile(
    rf"(?<![\w:/.<])/(?:{_ROOTS})/[^\s\"'<>]+|file://\S+|(?<!\w)[A-Za-z]:\\(?:Users|Windows|Program|Documents|data|models|te?mp)\b|\\\\\w+\\\w+|(?<!\S)~/\S+"
)
_WHOLE_PATH = re.compile(r"(?:/[^/\s<>{}]+){2,}/?|[A-Za-z]:\\[^<>{}|*?]+")
_TIME = re.compile(r"(?<!\d)(?:19|20)\d\d-[01]\d-[0-3]\d[T _]?[0-2]\d[:.h-]?[0-5]\d|\b[0-2]\d:[0-5]\d:[0-5]\d\b")
_EPOCHS = ((1_400_000_000, 2_100_000_000), (1_400_000_000_000, 2_100_000_000_000))
_PUBLIC_TEXT = frozenset({"vocab", "merges", "label2id", "id2label", "added_tokens_decoder", "chat_template"})
_GENERIC = re.compile(
    r"root|user|users|admin|ubuntu|debian|runner|localhost|jovyan|test|model|fedqsn|proxy|update|bert|"
    r"roberta|distilbert|electra|albert|deberta|modernbert|mpnet|gpt2|gptj|bloom|falcon|llama|llama3|"
    r"qwen2|qwen3|mistral|mixtral|gemma|gemma2|gemma3|phi3|bart|float32|float16|bfloat16|dtype|shape|"
    r"quant|type|blocksize|nested|offset|bitsandbytes|hidden|layer|layers|size|vocab|token|tokenizer",
    re.IGNORECASE,
)
_ORDINARY = re.compile(r"[A-Za-z0-9._-]{1,60}")
_SAFE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,39}")
_SEARCHED_COMPANIONS = frozenset(
    {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"}
)  # the others hold words and templates, in which anything may be a name
_LONGEST_STATE = 1 << 16  # bytes
_LARGEST_TEXT = 1 << 26  # bytes of a file that is read as text


SECRET_IN_BYTES = Rule(
    "FQ006",
    "secret-in-bytes",
    "hard",
    what="Key material, seeds, absolute paths, host or user names, clock times, or bytes that no format has a use for.",
    why="Metadata travels with the proxy; a seed or a key in it gives every mask away.",
    fix="Export with fedqsn, which writes none of these; clean the tokenizer and configuration files of the source.",
    scope="invariants",
    needs=(PROXY, KEY),
)


class SecretPatterns:
    """The spellings of a job's secrets. None of them is ever printed.

    Args:
        raw: looked for in every byte. spelled: looked for in text (lower case hexadecimal, base64).
    """

    def __init__(self, job: JobKey | None) -> None:
        self.raw: list[bytes] = []
        self.spelled: list[bytes] = []
        if job is None:
            return
        self.raw = [job.key, *_spellings(job.key)]
        self.spelled = [text for group in job.groups for text in _spellings(seed(job.key, SERVER, group))]

    @property
    def longest(self) -> int:
        """Bytes of the longest spelling."""
        return max(map(len, self.raw), default=1)

    def in_bytes(self, data: bytes) -> bool:
        """Is the key in these bytes?"""
        return any(pattern in data for pattern in self.raw)

    def in_text(self, data: bytes) -> bool:
        """Is the key or the seed of a group in this text?"""
        lower = data.lower()
        return self.in_bytes(data) or any(
            pattern in data or pattern in lower for pattern in (*self.raw[1:], *self.spelled)
        )


def _spellings(secret: bytes) -> list[bytes]:
    """Hexadecimal in both cases, and base64 in both alphabets without its padding."""
    text = secret.hex()
    plain = base64.b64encode(secret).rstrip(b"=")
    return [text.encode(), text.upper().encode(), plain, base64.urlsafe_b64encode(secret).rstrip(b"=")]


def find_problems(path: Path, patterns: SecretPatterns) -> Iterator[str]:
    """What is wrong with a file that is text, or with the header of a safetensors file."""
    if path.suffix == ".safetensors":
        yield from _header_problems(path, patterns)
        return
    with open(open_regular_file(path), "rb") as file:
        data = file.read(_LARGEST_TEXT)
    if patterns.in_text(data):
        yield "holds the job's key or the seed of a mask"
    if is_companion(path.name) and path.name not in _SEARCHED_COMPANIONS:
        return
    if path.suffix == ".json":
        yield from _json_problems(path, data)
    else:
        yield from _text_problems("", data.decode("utf-8", "replace"))


def _json_problems(path: Path, data: bytes) -> Iterator[str]:
    try:
        document = strictjson.loads(data, path.name)
    except FormatError:
        yield from _text_problems("", data.decode("utf-8", "replace"))
        return
    yield from _document_problems(document, "", _uncommon(document) if path.name == PROXY_MANIFEST else None)


def _uncommon(manifest: Any) -> tuple[str, ...]:
    """This machine's names that are not words of a manifest's fields, nor of the tensors and files that it lists."""
    fields = " ".join(_keys(manifest))
    return tuple(name for name in machine_names() if not _is_word_of(name, fields))


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _keys(item)


def _is_word_of(name: str, text: str) -> bool:
    """Is it a word of this text?"""
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", text) is not None


def _document_problems(value: Any, field: str, names: tuple[str, ...] | None = None) -> Iterator[str]:
    """Walk through a JSON document; `names` of this machine instead of all."""
    if isinstance(value, dict):
        for key, item in value.items():
            name = f"{field}.{key}".lstrip(".")
            if key in PRIVATE_FIELDS and item not in (None, ""):
                yield f"{_at(name)} is one that exports remove"
            elif PRIVATE_NAME.fullmatch(key) and not isinstance(item, dict):
                yield f"{_at(name)} has a name like that of a secret, a seed, a machine or a time"
            elif key in _PUBLIC_TEXT:
                continue
            else:
                yield from _text_problems(field, key, names)
                yield from _document_problems(item, name, names)
    elif isinstance(value, list):
        for item in value:
            yield from _document_problems(item, field, names)
    elif isinstance(value, str):
        yield from _text_problems(field, value, names)
    elif isinstance(value, int | float) and any(low <= value <= high for low, high in _EPOCHS):
        yield f"{_at(field)} looks like a clock time"


def _text_problems(field: str, text: str, names: tuple[str, ...] | None = None) -> Iterator[str]:
    if _PATH.search(text) or _WHOLE_PATH.fullmatch(text.strip()):
        yield f"{_at(field)} holds an absolute path"
    if _TIME.search(text):
        yield f"{_at(field)} holds a clock time"
    if any(_is_word_of(name, text) for name in (machine_names() if names is None else names)):
        yield f"{_at(field)} holds the name of this machine or of its user"


def ordinary(name: str, otherwise: str = "a file") -> str:
    """The name of a file, if it is an ordinary one; a path or a key could be in it."""
    return name if _ORDINARY.fullmatch(name) else otherwise


def _at(field: str) -> str:
    """A field's name if it cannot be a secret itself."""
    return f"field {field}" if _SAFE_NAME.fullmatch(field) else "a field" if field else "its text"


@cache
def machine_names() -> tuple[str, ...]:
    """Host and user name of this machine, unless they are ordinary words."""
    names = {socket.gethostname(), socket.gethostname().split(".")[0]}
    with contextlib.suppress(OSError, KeyError):
        names.add(getpass.getuser())
    return tuple(sorted(name for name in names if len(name) >= 4 and not _GENERIC.fullmatch(name)))


def _header_problems(path: Path, patterns: SecretPatterns) -> Iterator[str]:
    """The header of a safetensors file: no metadata but {"format": "pt"}."""
    with open(open_regular_file(path), "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        data = file.read(min(length, 1 << 27))
    if patterns.in_text(data):
        yield "holds the job's key or the seed of a mask in its header"
    try:
        document = json.loads(data)
        metadata = dict(document.get("__metadata__", {}))
    except (ValueError, TypeError, AttributeError, RecursionError):
        yield "has a header that cannot be read"
        return
    allowed: dict[str, str] = {} if path.name == VISIBLE_TENSORS else {"format": "pt"}
    if metadata != allowed:
        yield "carries metadata that exports do not write"
        yield from _document_problems(metadata, "")
    yield from _state_problems(path, document, 8 + length)


def _state_problems(path: Path, document: dict[str, Any], start: int) -> Iterator[str]:
    """Texts inside of a safetensors file: the JSON of packed tensors, also where the file is otherwise unusable."""
    with open(open_regular_file(path), "rb") as file:
        for name, entry in document.items():
            try:
                begin, end = map(int, entry["data_offsets"])
            except (KeyError, TypeError, ValueError):
                continue
            if ".quant_state." not in name or not 0 <= begin < end <= begin + _LONGEST_STATE:
                continue
            file.seek(start + begin)
            try:
                yield from _document_problems(strictjson.loads(file.read(end - begin), name), "")
            except FormatError:
                continue
