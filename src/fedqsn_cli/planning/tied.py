"""Tensors that are one tensor in memory, even when a checkpoint stores several copies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedqsn_cli.planning.roles import rules


def tied_groups(tensors: Mapping[str, tuple[str, tuple[int, ...]]], config: Mapping[str, Any]) -> dict[str, str]:
    """Group name of each tensor that may share its numbers with another one: the input embedding's name.

    Copies of the input embedding are one tensor whatever the config says. Output layers join in unless the config says
    `tie_word_embeddings: false`. Tensors of different shapes are never tied. In doubt tensors are grouped: one mask for
    two tensors hides as many units of each, two masks for one tensor hide nothing.

    Args:
        tensors: name -> (dtype, shape).
    """
    patterns = [rules().tied_inputs]
    if tie_word_embeddings(config) is not False:
        patterns.append(rules().tied_outputs)
    alike: dict[tuple[int, ...], list[tuple[int, int, str]]] = {}
    for name, (_, shape) in tensors.items():
        rank = next((rank for rank, pattern in enumerate(patterns) if pattern.search(name)), None)
        if rank is not None and len(shape) == 2:
            alike.setdefault(tuple(shape), []).append((rank, len(name), name))
    return {name: min(members)[2] for members in alike.values() for _, _, name in members}


def tie_word_embeddings(config: Mapping[str, Any]) -> bool | None:
    """What config.json says about tying, None where it is silent; the text part of a composite model counts too."""
    for section in (config, config.get("text_config")):
        if isinstance(section, Mapping) and isinstance(section.get("tie_word_embeddings"), bool):
            return bool(section["tie_word_embeddings"])
    return None


def model_type(config: Mapping[str, Any] | None) -> str | None:
    """The model type that config.json names, None where it names none."""
    found = (config or {}).get("model_type")
    return found if isinstance(found, str) else None
