"""Models of helpers.py with four layers that differ, for what is said layer by layer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from support.helpers import Tensors, make_config, make_tensors, write_model

LAYER = re.compile(r"\b(layers|layer|h|block)\.0\.")
DEPTH = 4


def deep(name: str, **options: Any) -> Tensors:
    """A family's tensors with four different layers."""
    tensors: Tensors = {}
    for number in range(DEPTH):
        for tensor, value in make_tensors(name, seed=number, **options).items():
            tensors.setdefault(LAYER.sub(rf"\g<1>.{number}.", tensor, count=1), value)
    return tensors


def deep_model(folder: Path, name: str = "bert", **options: Any) -> Path:
    return write_model(folder, deep(name, **options), make_config(name, options.get("dtype", "F32")))
