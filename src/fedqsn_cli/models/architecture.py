"""What a model is for, from its config.json and the names of its files: neither torch nor transformers is needed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fedqsn_cli.checkpoint import Checkpoint
from fedqsn_cli.errors import InputError

Task = Literal[
    "classification",
    "regression",
    "multi-label",
    "token-classification",
    "causal-lm",
    "masked-lm",
    "seq2seq",
]

CLASSIFIERS: tuple[Task, ...] = ("classification", "regression", "multi-label", "token-classification")
"""Tasks whose models have a head of their own, with as many outputs as there are labels or numbers."""

# Ends of architecture names, and what such a model is for.
HEADS: dict[str, Task] = {
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "token-classification",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForConditionalGeneration": "seq2seq",
}

# What a sequence classifier learns, by the problem type in its config.json.
_PROBLEMS: dict[object, Task] = {
    "single_label_classification": "classification",
    "regression": "regression",
    "multi_label_classification": "multi-label",
}


def task_of(config: Mapping[str, Any] | None, where: object) -> tuple[Task, str]:
    """The task and the architecture of a model, from its config.json.

    Raises:
        InputError: there is no config.json, or its architecture is for something else.
    """
    if config is None:
        raise InputError("there is no config.json", where=where, hint="give the folder that save_pretrained made")
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else None
    if not isinstance(name, str):
        raise InputError("config.json does not name one architecture", where=where, hint="save the model with its head")
    for ending, task in HEADS.items():
        if name.endswith(ending):
            return (_problem(config, where) if task == "classification" else task), name
    hint = f"known heads: {', '.join(HEADS)}"
    raise InputError(f"architecture {name} has no head that can be used", where=where, hint=hint)


def is_known_architecture(name: str) -> bool:
    """Whether transformers has an architecture, by the text of its table; importing the library would take seconds.

    True where it is not installed: then nothing can be said.
    """
    found = importlib.util.find_spec("transformers")
    table = Path(found.origin).parent / "models" / "auto" / "modeling_auto.py" if found and found.origin else None
    return table is None or not table.is_file() or f'"{name}"' in table.read_text("utf-8")


def _problem(config: Mapping[str, Any], where: object) -> Task:
    """What a sequence classifier learns: as its problem type says; without one, a single output is a number."""
    named = config.get("problem_type")
    if named is None:
        return "regression" if label_count(config) == 1 else "classification"
    if not isinstance(named, str) or named not in _PROBLEMS:
        raise InputError(f"problem type {named!r} is unknown", where=where, hint="see docs/data.md")
    return _PROBLEMS[named]


def label_count(config: Mapping[str, Any]) -> int:
    """Number of outputs of a classifier, as transformers reads it from config.json."""
    names, count = config.get("id2label"), config.get("num_labels")
    return len(names) if isinstance(names, Mapping) else count if type(count) is int else 2


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether there are files of a tokenizer beside a model."""
    return any(path.name != "generation_config.json" for path in checkpoint.companions)
