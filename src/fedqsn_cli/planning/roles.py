"""Which role a tensor has: the table rules.toml, compiled once."""

from __future__ import annotations

import functools
import re
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any

UNIT_AXIS = {
    "linear": "row",
    "conv1d": "column",
    "embedding": "column",
    "head": "column",
    "router": "column",
    "expert": "row",
    "expert_stack": "row",
}
"""The axis of a role's units in its stored shape (a transposed stack: column)."""

LINEAR_ROLES = frozenset({"linear", "conv1d", "expert", "expert_stack"})
"""Roles whose unit `--axis` changes."""

PUBLIC_ROLES = frozenset({"norm", "bias", "buffer"})
ROLES = (*UNIT_AXIS, *sorted(PUBLIC_ROLES))
"""Every role that a rule or an override may name; `unknown` is what is left."""

DIMENSIONS = {role: 3 if role == "expert_stack" else 2 for role in UNIT_AXIS}


@dataclass(frozen=True, slots=True)
class Role:
    """What a rule says about a tensor; `fresh` layers belong to a head, which a fine-tuning starts anew."""

    name: str
    transposed: bool = False
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class _Rule:
    role: Role
    modules: re.Pattern[str]
    tensors: re.Pattern[str]
    dims: frozenset[int] | None
    types: frozenset[str] | None

    def fits(self, name: str, ndim: int, model_type: str | None) -> bool:
        if self.types is not None and model_type not in self.types:
            return False
        if self.dims is not None and ndim not in self.dims:
            return False
        if self.tensors.search(name):
            return True
        return name.endswith(".weight") and self.modules.search(name.removesuffix(".weight")) is not None


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of a transformer layer a matrix is.

    Args:
        name: attention, mlp or neither. output: it writes back what its part has computed.
    """

    name: str
    output: bool
    modules: re.Pattern[str]
    tensors: re.Pattern[str]

    def fits(self, name: str) -> bool:
        """Whether the tensor of this name belongs to it."""
        module = name.removesuffix(".weight") if name.endswith(".weight") else ""
        return self.modules.search(module) is not None or self.tensors.search(name) is not None


@dataclass(frozen=True, slots=True)
class Rules:
    """The table rules.toml."""

    rules: tuple[_Rule, ...]
    tied_inputs: re.Pattern[str]
    tied_outputs: re.Pattern[str]
    new_heads: tuple[str, ...]
    output_modules: dict[str, list[str]]
    never_packed: dict[str, re.Pattern[str]]
    parts: tuple[Part, ...]
    containers: re.Pattern[str]
    before_layers: re.Pattern[str]

    def role(self, name: str, ndim: int, model_type: str | None) -> Role | None:
        """The role that the first fitting rule gives to a tensor, or None."""
        return next((rule.role for rule in self.rules if rule.fits(name, ndim, model_type)), None)

    def can_be_packed(self, module: str, model_type: str | None) -> bool:
        """Whether transformers replaces this linear module by a bitsandbytes one."""
        never = self.never_packed.get(model_type or "")
        return never is None or never.search(module) is None

    def part(self, name: str) -> Part | None:
        """The part of a transformer layer that a linear layer's weight belongs to, None if no rule tells."""
        return next((part for part in self.parts if part.fits(name)), None)

    def layer(self, name: str) -> int | None:
        """Number of the transformer layer that a tensor belongs to, None outside of them."""
        found = self.containers.search(name)
        return int(found[1]) if found is not None else None


def endings(patterns: list[str]) -> re.Pattern[str]:
    """One expression that fits names ending in one of the patterns, whole dotted components only."""
    if not patterns:
        return re.compile(r"(?!)")
    alternatives = "|".join(re.escape(pattern).replace(r"\*", "[^.]*") for pattern in patterns)
    return re.compile(rf"(?:^|\.)(?:{alternatives})$")


@functools.cache
def rules() -> Rules:
    """The table that ships with fedqsn."""
    document = tomllib.loads(resources.files("fedqsn_cli.planning").joinpath("rules.toml").read_text("utf-8"))
    return Rules(
        rules=tuple(_compile(rule) for rule in document["rule"]),
        tied_inputs=endings([f"{module}.weight" for module in document["tied"]["inputs"]]),
        tied_outputs=endings([f"{module}.weight" for module in document["tied"]["outputs"]]),
        new_heads=tuple(document["new_heads"]["modules"]),
        output_modules=document["output_modules"],
        never_packed={model: endings(names) for model, names in document["never_packed"].items()},
        parts=tuple(_compile_part(part) for part in document["part"]),
        containers=re.compile(rf"(?:^|\.)(?:{'|'.join(document['layers']['containers'])})\.([0-9]+)\."),
        before_layers=endings([f"{module}.weight" for module in document["layers"]["before"]]),
    )


def _compile(rule: dict[str, Any]) -> _Rule:
    return _Rule(
        role=Role(rule["role"], rule.get("transposed", False), rule.get("fresh", False)),
        modules=endings(rule.get("modules", [])),
        tensors=endings(rule.get("tensors", [])),
        dims=frozenset(rule["dims"]) if "dims" in rule else None,
        types=frozenset(rule["types"]) if "types" in rule else None,
    )


def _compile_part(part: dict[str, Any]) -> Part:
    modules, tensors = endings(part.get("modules", [])), endings(part.get("tensors", []))
    return Part(part["part"], part.get("output", False), modules, tensors)
