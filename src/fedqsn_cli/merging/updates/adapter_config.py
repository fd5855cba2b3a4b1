"""adapter_config.json of an update: it says what update.json says, and nothing that peft would act upon otherwise.

Whoever opens a merged or received adapter with peft believes this file: it can name a model to download or classes to
import, and it can change what the factors mean. So nothing is allowed in it but what `client-train` writes; options
that peft gets later may be there while they are off.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedqsn_cli import strictjson
from fedqsn_cli.artifacts.manifests import ADAPTER_CONFIG, UPDATE_MANIFEST, UpdateManifest
from fedqsn_cli.artifacts.update_folder import PEFT_PREFIX, lora_scaling
from fedqsn_cli.checkpoint.files import read_file
from fedqsn_cli.errors import RefusedUpdate

_LARGEST_NUMBER = 2**64
_OFF: tuple[object, ...] = (None, False, "none")
_NAMES = ("target_modules", "modules_to_save")
_VERSION = re.compile(r"[0-9A-Za-z.+]{1,40}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _LARGEST_NUMBER


_FREE: Mapping[str, Callable[[Any], bool]] = {
    "peft_type": lambda value: value == "LORA",
    "peft_version": lambda value: isinstance(value, str) and _VERSION.fullmatch(value) is not None,
    "task_type": lambda value: value in (None, "CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS"),
    "inference_mode": lambda value: type(value) is bool,
    "lora_dropout": _is_number,
    "fan_in_fan_out": lambda value: type(value) is bool,
    "use_rslora": lambda value: type(value) is bool,
    "init_lora_weights": lambda value: type(value) is bool,
    "megatron_core": lambda value: value == "megatron.core",
    "qalora_group_size": lambda value: type(value) is int,
    "r": lambda value: type(value) is int,
    "lora_alpha": _is_number,
}
"""What changes nothing, or is compared with update.json: the values that are allowed."""


def read_config(folder: Path, manifest: UpdateManifest) -> Mapping[str, Any]:
    """Read and check the configuration of an update's adapters.

    Raises:
        RefusedUpdate: it is not the file that update.json describes, contradicts it, or has more in it.
        FormatError, InputError: it is not JSON, or cannot be read.
    """
    path = folder / ADAPTER_CONFIG
    data = read_file(path, UpdateManifest.LARGEST)
    if hashlib.sha256(data).hexdigest() != manifest.files[ADAPTER_CONFIG]:
        raise RefusedUpdate(f"its digest is not the one in {UPDATE_MANIFEST}", where=path, hint="send it again")
    document = strictjson.loads(data, path)
    if not isinstance(document, dict):
        raise RefusedUpdate("is not a JSON object", where=path)
    for key, value in document.items():
        if key not in _NAMES and not (_FREE[key](value) if key in _FREE else _is_off(value)):
            raise RefusedUpdate(f"{key!r} has a value that no update has", where=path)
    _check_scaling(document, manifest, path)
    _check_modules(document, manifest, path)
    return document


def _is_off(value: object) -> bool:
    """Whether an option is not used."""
    return value in ([], {}, "") or any(value is off or value == off for off in _OFF)


def _check_scaling(document: Mapping[str, Any], manifest: UpdateManifest, path: Path) -> None:
    """Refuse a rank or a scale that is not that of every adapter."""
    rank, alpha = document.get("r", 0), document.get("lora_alpha", 0)
    if not (0 < rank < _LARGEST_NUMBER and alpha > 0):
        raise RefusedUpdate("has no rank or no scale", where=path)
    scaling = lora_scaling(rank, alpha, rank_stabilised=document.get("use_rslora", False))
    for name, adapter in (manifest.adapters or {}).items():
        if (adapter.rank, adapter.scaling) != (rank, scaling):  # exactly: digests cover the scale in this file only
            raise RefusedUpdate(f"contradicts {UPDATE_MANIFEST} about {name}", where=path)


def _check_modules(document: Mapping[str, Any], manifest: UpdateManifest, path: Path) -> None:
    """Refuse names of other modules than those of update.json."""
    targets, saved = (document.get(name) for name in _NAMES)
    modules = {adapter.module for adapter in (manifest.adapters or {}).values()}
    if not isinstance(targets, list) or sorted(modules) != sorted(PEFT_PREFIX + str(name) for name in targets):
        raise RefusedUpdate(f"adapts other modules than {UPDATE_MANIFEST} says", where=path)
    kept = list((manifest.saved or {}).values())
    names = [f"{PEFT_PREFIX}{name}." for name in saved] if isinstance(saved, list) else []
    empty = any(not any(tensor.startswith(name) for tensor in kept) for name in names)
    unnamed = any(not tensor.startswith(tuple(names)) for tensor in kept)
    if not isinstance(saved, list | None) or empty or unnamed:
        raise RefusedUpdate(f"trains other modules in full than {UPDATE_MANIFEST} says", where=path)
