"""`llm_int8_skip_modules`: which modules transformers must not replace by bitsandbytes ones.

transformers replaces every module that is exactly an `nn.Linear` or a `Conv1D`, unless an entry of the list fits its
name: as a regular expression from the start of the name up to a component boundary, or as a suffix. A list that is
given replaces the defaults, so it has to be complete, and no entry may hit a module whose weight is stored packed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedqsn_cli.planning.roles import UNIT_AXIS, rules
from fedqsn_cli.planning.tied import model_type

if TYPE_CHECKING:
    from fedqsn_cli.planning.tensor_plan import TensorPlan

EXPERTS = r".*\.experts"
"""One entry for what may be ten thousand modules."""


def skip_modules(tensors: Sequence[TensorPlan], config: Mapping[str, Any] | None) -> list[str]:
    """Every module that transformers would pack although its weight is stored dense, sorted.

    Among them are output layers that are tied, and heads that a user may add: they have no tensor in the file.
    """
    packed = [_module(tensor) for tensor in tensors if tensor.packable and tensor.quantized]
    dense = {_module(tensor) for tensor in tensors if _is_dense_linear(tensor)}
    dense.update(rules().new_heads, _output_modules(model_type(config)))
    entries = {_entry(module, packed) for module in dense.difference(packed)}
    if any(tensor.role == "expert" for tensor in tensors):
        entries.add(EXPERTS)
    return sorted(entries)


def _output_modules(model: str | None) -> list[str]:
    """Names of the output layers of a model type."""
    return [name for name, types in rules().output_modules.items() if model in types] or ["lm_head"]


def fits(entry: str, module: str) -> bool:
    """Whether an entry of the list keeps transformers from replacing a module."""
    return module.endswith(entry) or re.match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", module) is not None


def _module(tensor: TensorPlan) -> str:
    return tensor.name.removesuffix(".weight")


def _is_dense_linear(tensor: TensorPlan) -> bool:
    """Whether a dense weight may belong to an `nn.Linear`; embeddings never do, experts have an entry of their own."""
    if tensor.role in ("embedding", "expert") or tensor.role not in UNIT_AXIS or not tensor.name.endswith(".weight"):
        return False
    return not (tensor.packable and tensor.quantized)


def _entry(module: str, packed: list[str]) -> str:
    """The module's name; escaped and anchored where the plain name would also hit a packed module."""
    plain = re.fullmatch(r"[\w.-]+", module) is not None and not any(fits(module, name) for name in packed)
    return module if plain else f"^{re.escape(module)}$"
