"""config.json: what fedqsn and transformers take from it, checked once, before anything is built by it.

Types are those that transformers writes. Counts and sizes are held against the tensors that are really there: a model
of a thousand million layers, or with a table of positions larger than all files, is refused before anybody builds it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fedqsn_cli.errors import FormatError

MOST_LAYERS = 1024
"""Layers, heads, experts ... of any model; more only where that many tensors, or rows of one, are there."""

_LARGEST_SIZE = 1 << 24  # of a dimension, whatever the tensors are; positions of rotary embeddings need no tensor
_MOST_POSITIONS = 1 << 31
_INT64 = 2**63
_COUNT = re.compile(r"(?:.*_)?(?:num|n)_.*|.*(?:layers?|blocks?|groups?|experts?|heads?|labels|group_num)")
_SIZE = re.compile(r"(?:.*_)?(?:size|dim|width|embd|inner|rank|channels)|d_[a-z]+")
_NAMED = re.compile(r".*(?:_ids?|token|theta|seed|seeds|code|per_tok|shift)")  # numbers that count nothing
_POSITIONS = re.compile(r".*(?:position|window|length|context).*")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_ids(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return all(type(item) is int for item in items)


def _is_names(value: Any) -> bool:
    """Names by number, as `id2label` has them."""
    return _is_object(value) and all(re.fullmatch(r"-?\d{1,9}", key) for key in value)


def _is_numbers(value: Any) -> bool:
    """Numbers by name, as `label2id` has them."""
    return _is_object(value) and all(re.fullmatch(r"-?\d{1,9}", str(item)) for item in value.values())


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "architectures": (_is_texts, "a list of names"),
    "model_type": (_is_text, "text"),
    "dtype": (_is_text, "text"),
    "torch_dtype": (_is_text, "text"),
    "tie_word_embeddings": (_is_bool, "true or false"),
    "is_encoder_decoder": (_is_bool, "true or false"),
    "return_dict": (lambda value: value is True, "true"),
    "quantization_config": (_is_object, "an object"),
    "text_config": (_is_object, "an object"),
    "id2label": (_is_names, "an object of names by number"),
    "label2id": (_is_numbers, "an object of numbers by name"),
    "problem_type": (_is_text, "text"),
    "pad_token_id": (_is_ids, "an id"),
    "bos_token_id": (_is_ids, "an id"),
    "eos_token_id": (_is_ids, "an id"),
}
_NESTED = ("text_config",)  # parts of a composite model whose fields are read as the model's own


def check_config(config: Mapping[str, Any], tensors: Mapping[str, int], where: object) -> None:
    """Refuse a config.json that nothing can be built by, or that asks for more than its tensors are.

    Args:
        config: the parsed document.
        tensors: bytes of each tensor that is there, by name.

    Raises:
        FormatError: a field has another type, or a count or size is out of range.
    """
    for section in (config, *(config.get(name) for name in _NESTED)):
        for name, (is_right, wanted) in _KINDS.items():
            if isinstance(section, Mapping) and section.get(name) is not None and not is_right(section[name]):
                raise FormatError(f"field {name} must be {wanted}", where=where)
    largest = max(tensors.values(), default=0)
    for name, value in _whole_numbers(config):
        problem = _problem(name, value, len(tensors), largest)
        if problem is not None:
            raise FormatError(f"field {name} is {_shown(value)}: {problem}", where=where)


def _whole_numbers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Every whole number of a document, by the key that it is under."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _whole_numbers(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from _whole_numbers(item, name)
    elif type(value) is int:
        yield name, value


def _problem(name: str, value: int, tensors: int, largest: int) -> str | None:
    """What is wrong with a number of that name, where `largest` is the bytes of the largest tensor."""
    if not -_INT64 <= value < _INT64:
        return "beyond 64 bits"
    if _NAMED.fullmatch(name):
        return None
    if _POSITIONS.fullmatch(name):
        return "more positions than any model has" if value > _MOST_POSITIONS else None
    if _COUNT.fullmatch(name):
        if value < 0 or (value == 0 and name.endswith("heads")):
            return "no count"
        if value > max(MOST_LAYERS, tensors, 2 * largest):
            return f"but there are {tensors} tensors"
        return f"but there are {tensors} tensors" if "layer" in name and value > max(MOST_LAYERS, tensors) else None
    if _SIZE.fullmatch(name) and value > max(_LARGEST_SIZE, 2 * largest):
        return f"but no tensor has more than {largest} bytes"
    return None


def _shown(value: int) -> str:
    return str(value) if abs(value) < _INT64 else "too large"
