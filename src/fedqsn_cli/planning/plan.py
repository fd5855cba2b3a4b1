"""For each tensor: its role, its units, the group that shares its mask, and whether it is quantized.

Roles come from the table rules.toml (see `roles.py`) and from the user's overrides (see `overrides.py`). The plan is
computed from names, shapes and config.json alone, before any weight is read; it can be printed, and is then executed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedqsn_cli import strictjson
from fedqsn_cli.dtypes import WEIGHT_DTYPES
from fedqsn_cli.errors import PlanError
from fedqsn_cli.planning.overrides import Override, apply_overrides, canonical
from fedqsn_cli.planning.placement import Location, Placement, location_of
from fedqsn_cli.planning.roles import DIMENSIONS, LINEAR_ROLES, UNIT_AXIS, Role, rules
from fedqsn_cli.planning.skip_modules import skip_modules
from fedqsn_cli.planning.tensor_plan import MASK_AXES, TRANSPOSED, TensorPlan, UnitAxis, units_per_slice
from fedqsn_cli.planning.tied import model_type, tied_groups


@dataclass(frozen=True)
class Plan:
    """The plan of a whole checkpoint, in checkpoint order."""

    tensors: tuple[TensorPlan, ...]
    axis: str
    overrides: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all that decides the masks; neither order nor dtype nor quantization is in it."""
        rows = [tensor.deciding() for tensor in self.tensors]
        document = {"format": "fedqsn-plan/1", "axis": self.axis, "tensors": sorted(rows)}
        return hashlib.sha256(strictjson.dumps(document).encode()).hexdigest()

    @property
    def unknown(self) -> list[TensorPlan]:
        """Tensors that no rule knows."""
        return [tensor for tensor in self.tensors if tensor.role == "unknown"]

    def require_known(self) -> None:
        """Refuse a plan that would send a tensor in the clear only because nobody knows what it is.

        Raises:
            PlanError: some tensor has the role unknown.
        """
        if not (unknown := self.unknown):
            return
        first = unknown[0]
        more = f" (nor {len(unknown) - 1} others)" if len(unknown) > 1 else ""
        raise PlanError(
            f"no rule knows this tensor, {first.dtype} {list(first.shape)}{more}",
            where=first.name,
            hint="name its role in a plan file given with --plan-file; `fedqsn inspect --show-plan` shows all tensors",
        )

    def groups(self) -> dict[str, int]:
        """Number of units of each group, in checkpoint order."""
        return {group: tensor.units for tensor in self.tensors for group in tensor.groups}

    def ratios(self) -> dict[str, float]:
        """p1 of each group that has another one than the job."""
        return {group: tensor.p1 for tensor in self.tensors if tensor.p1 is not None for group in tensor.groups}

    def sizes(self) -> tuple[dict[str, tuple[int, int]], int]:
        """Units and parameters of each group, and the parameters that are in no group."""
        sizes: dict[str, tuple[int, int]] = {}
        clear = 0
        for tensor in self.tensors:
            parameters = math.prod(tensor.shape)
            if not tensor.groups:
                clear += parameters if tensor.dtype in WEIGHT_DTYPES else 0
            for group in tensor.groups:
                sizes[group] = tensor.units, sizes.get(group, (0, 0))[1] + parameters // len(tensor.groups)
        return sizes, clear

    def skip_modules(self, config: Mapping[str, Any] | None) -> list[str]:
        """The full `llm_int8_skip_modules`: every module that transformers would pack and that is stored dense."""
        return skip_modules(self.tensors, config)


def make_plan(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    config: Mapping[str, Any] | None,
    *,
    axis: str = "neuron",
    overrides: dict[str, Any] | None = None,
) -> Plan:
    """Plan a checkpoint from its logical tensors; pure, no I/O.

    Args:
        tensors: name -> (safetensors dtype, shape); packed weights under their original names, shapes and dtypes.
        config: config.json, or None for a single file.
        axis: the unit of linear layers: an output neuron, an input feature, or a single weight.
        overrides: as `load_overrides` returns them.

    Raises:
        PlanError: unknown axis, an override that cannot be, a dtype that cannot be masked, foreign quantization.
    """
    if axis not in MASK_AXES:
        raise PlanError(f"unknown axis {axis!r}", hint=f"choose one of {', '.join(MASK_AXES)}")
    _refuse_foreign_quantization(config)
    checked = canonical(overrides or {})
    planner = _Planner(tensors, config or {}, axis, apply_overrides(checked, tensors), Placement.of(checked))
    planned = [planner.plan(name) for name in tensors]
    planner.placement.check(planner.locations)
    if checked["rule"]:
        plain = _Planner(tensors, config or {}, axis, {}, replace(planner.placement, strict=False))
        planned = [replace(tensor, cleared=_is_cleared(tensor, plain.plan(tensor.name))) for tensor in planned]
    _check_ties(planned, planner.tied)
    _check_ratios(planned, checked["rule"])
    return Plan(tuple(planned), axis, checked)


class _Planner:
    """The tensors of one checkpoint, and what decides about each: overrides first, then rules and placement.

    Attributes:
        tied: the group name of each tensor that may share its numbers with another one.
        locations: layers, embeddings and head that planned weights belong to; filled by `plan`.
    """

    def __init__(
        self,
        tensors: Mapping[str, tuple[str, tuple[int, ...]]],
        config: Mapping[str, Any],
        axis: str,
        overrides: dict[str, Override],
        placement: Placement,
    ) -> None:
        self.tensors = tensors
        self.model_type = model_type(config)
        self.axis = axis
        self.overrides = overrides
        self.placement = placement
        self.tied = tied_groups(tensors, config)
        self.locations: set[Location] = set()

    def plan(self, name: str) -> TensorPlan:
        """Plan one tensor, by what it is: a weight with units, the bias of one, or a public tensor.

        Raises:
            PlanError: its role does not fit its shape or dtype, or nothing says which part of a layer it is.
        """
        role = self.role(name)
        if role is not None and role.name in UNIT_AXIS:
            return self.weight(name, role)
        owner = _weight_beside(name, self.tensors)
        if role is None and owner is not None:
            return self.bias(name, owner)
        return self.public(name, role.name if role else "unknown")

    def override(self, name: str) -> Override:
        """What the plan file says about a tensor; an override that sets nothing where it says nothing."""
        return self.overrides.get(name, Override())

    def role(self, name: str) -> Role | None:
        """The role that an override or a rule gives to a tensor; None for plain biases and for the unknown."""
        dtype, shape = self.tensors[name]
        ruled = rules().role(name, len(shape), self.model_type)
        asked = self.override(name).role
        role = ruled
        if asked is not None and (ruled is None or ruled.name != asked):
            role = Role(asked, transposed=asked == "conv1d")
        if role is None or role.name == "buffer":
            return role
        if role.name in DIMENSIONS:
            _check_shape(name, role.name, shape)
        return role if _is_float(name, dtype) else None

    def weight(self, name: str, role: Role) -> TensorPlan:
        """A matrix, or a stack of them, with units; its tied tensors have the same groups, and so the same masks."""
        dtype, shape = self.tensors[name]
        asked = self.override(name)
        view = (shape[0] if len(shape) == 3 else 1, shape[-2], shape[-1])
        axis = self.unit_axis(role)
        place, excluded = self.placed(name, role.name)
        masked = asked.masked if asked.masked is not None else excluded is None
        quantized = asked.quantized is not False
        return TensorPlan(
            name,
            dtype,
            shape,
            role.name,
            axis if masked else None,
            view,
            groups=_slices(self.tied.get(name, name), view[0]) if masked else (),
            units=units_per_slice(axis, view) if masked else 0,
            masked=masked,
            quantized=quantized,
            packable=self.packable(name, role),
            origin=_origin(asked, None if masked else excluded),
            p1=(self.placement.ratios.get(place) if asked.p1 is None else asked.p1) if masked else None,
        )

    def placed(self, name: str, role: str) -> tuple[Location, str | None]:
        """Where a weight is, and the option that leaves it visible, if one does."""
        embedding = role == "embedding" or rules().tied_inputs.search(self.tied.get(name, "")) is not None
        place = location_of(name, embedding=embedding)
        self.locations.add(place)
        if self.override(name).masked is not None:
            return place, None
        return place, self.placement.excludes(name, role, place, embedding=embedding)

    def packable(self, name: str, role: Role) -> bool:
        """Whether transformers holds the tensor packed; where an override contradicts a rule, dense is safe."""
        ruled = rules().role(name, len(self.tensors[name][1]), self.model_type)
        if role.name not in ("linear", "conv1d") or (ruled is not None and ruled.name != role.name):
            return False
        return name.endswith(".weight") and rules().can_be_packed(name.removesuffix(".weight"), self.model_type)

    def unit_axis(self, role: Role) -> UnitAxis:
        """The axis of units in the stored shape; `--axis` changes that of linear roles only."""
        if role.name not in LINEAR_ROLES:
            return "column"
        if self.axis == "element":
            return "element"
        output: UnitAxis = "column" if role.transposed else "row"
        return TRANSPOSED[output] if self.axis == "input" else output

    def bias(self, name: str, owner: str) -> TensorPlan:
        """A bias hides with the output neuron it belongs to."""
        weight = self.plan(owner)
        dtype, shape = self.tensors[name]
        asked = self.override(name)
        if not _is_float(name, dtype) or weight.role in ("unknown", "buffer") or not shape:
            return self.public(name, "unknown")
        if weight.role not in LINEAR_ROLES:
            return self.public(name, "norm" if weight.role == "norm" else "bias")
        if not weight.masked or self.axis == "input" or asked.masked is False:
            return self.public(name, "bias")
        if asked.quantized:
            raise PlanError("quantized = true: a bias is never quantized", where=name)
        view = (weight.view[0], shape[-1], 1)
        if view[0] * view[1] != math.prod(shape) or (weight.axis != "element" and view[1] != weight.units):
            return self.public(name, "unknown")
        own = weight.axis == "element"
        return TensorPlan(
            name,
            dtype,
            shape,
            "bias",
            "element" if own else "row",
            view,
            groups=_slices(name, view[0]) if own else weight.groups,
            units=view[1],
            masked=True,
            quantized=False,
            packable=False,
            origin=_origin(asked),
            p1=weight.p1 if asked.p1 is None else asked.p1,
        )

    def public(self, name: str, role: str) -> TensorPlan:
        """A tensor without units: it is sent as it is."""
        dtype, shape = self.tensors[name]
        asked = self.override(name)
        for field, wanted in (("masked", asked.masked), ("quantized", asked.quantized)):
            if wanted and role != "unknown":
                raise PlanError(f"{field} = true: a {role} has no units of its own", where=name)
        return TensorPlan(
            name,
            dtype,
            shape,
            role,
            None,
            (1, 1, math.prod(shape)),
            groups=(),
            units=0,
            masked=False,
            quantized=False,
            packable=False,
            origin=_origin(asked),
        )


def _is_cleared(tensor: TensorPlan, by_rules_alone: TensorPlan) -> bool:
    hidden_or_unknown = by_rules_alone.masked or by_rules_alone.role == "unknown"
    return hidden_or_unknown and not tensor.masked and tensor.role != "unknown"


def _check_ties(tensors: list[TensorPlan], tied: dict[str, str]) -> None:
    """Tied tensors hold the same numbers: what one copy hides and another shows is not hidden.

    Raises:
        PlanError: an override treats the copies differently.
    """
    first: dict[str, TensorPlan] = {}
    for tensor in tensors:
        if tensor.name not in tied or tensor.role == "unknown":
            continue
        other = first.setdefault(tied[tensor.name], tensor)
        if (tensor.axis, tensor.masked, tensor.quantized) != (other.axis, other.masked, other.quantized):
            hint = "let one rule match both, or write tie_word_embeddings: false in config.json if they are not tied"
            raise PlanError(f"tied to {other.name}, but the plan treats them differently", where=tensor.name, hint=hint)


def _check_ratios(tensors: list[TensorPlan], listed: list[dict[str, Any]]) -> None:
    """One mask has one ratio, and a rule that sets one means something that is hidden.

    Raises:
        PlanError: an override gives tensors of one group two ratios, or a ratio to nothing.
    """
    first: dict[str, TensorPlan] = {}
    for tensor in tensors:
        for group in tensor.groups:
            other = first.setdefault(group, tensor)
            if other.p1 != tensor.p1:
                raise PlanError(
                    f"has the mask of {other.name}, but another p1", where=tensor.name, hint="let one rule match both"
                )
    masked = {source for tensor in tensors if tensor.masked for source in tensor.origin.split(", ")}
    for number, rule in enumerate(listed, 1):
        if "p1" in rule and f"rule {number}" not in masked:
            raise PlanError(f"match = {rule['match']!r} fits nothing that is masked", where=f"rule {number}")


def _weight_beside(name: str, tensors: Mapping[str, object]) -> str | None:
    """The weight that a bias belongs to: `x.weight` for `x.bias`, the stack `x` for `x_bias`."""
    for ending, weight in ((".bias", ".weight"), ("_bias", "")):
        if name.endswith(ending) and (owner := name.removesuffix(ending) + weight) in tensors:
            return owner
    return None


def _slices(group: str, lead: int) -> tuple[str, ...]:
    return (group,) if lead == 1 else tuple(f"{group}#{index}" for index in range(lead))


def _origin(asked: Override, option: str | None = None) -> str:
    return ", ".join(("rules", *asked.sources, *([option] if option else [])))


def _is_float(name: str, dtype: str) -> bool:
    """Whether a weight can be masked; integers in its place make it unknown.

    Raises:
        PlanError: a float format that fedqsn does not compute with.
    """
    if dtype.startswith("F") and dtype not in WEIGHT_DTYPES:
        raise PlanError(f"dtype {dtype} is not supported", where=name, hint="convert it to F32, BF16 or F16")
    return dtype in WEIGHT_DTYPES


def _check_shape(name: str, role: str, shape: tuple[int, ...]) -> None:
    if len(shape) != DIMENSIONS[role]:
        raise PlanError(f"role {role} needs {DIMENSIONS[role]} dimensions, the shape is {list(shape)}", where=name)
    if 0 in shape:
        raise PlanError(f"the tensor is empty: shape {list(shape)}", where=name)


def _refuse_foreign_quantization(config: Mapping[str, Any] | None) -> None:
    found = (config or {}).get("quantization_config")
    method = found.get("quant_method", "bitsandbytes") if isinstance(found, Mapping) else "bitsandbytes"
    if method != "bitsandbytes":
        hint = "start from the checkpoint in full precision"
        raise PlanError(f"the checkpoint is quantized with {method}", where="config.json", hint=hint)
