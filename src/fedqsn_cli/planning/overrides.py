"""The user's own rules: a TOML file that overrides what rules.toml says.

    [[rule]]
    match = "model.layers.*.self_attn.q_proj.weight"   # glob over whole tensor names, `*` crosses dots
    role = "linear"                                    # optional
    masked = false                                     # optional
    quantized = false                                  # optional
    p1 = 0.9                                           # optional: another ratio than the job's

Before the rules, `where`, `layers` and `p1` may say what is hidden as a whole: see `placement.py`. Rules win over them.
Every rule that matches a tensor applies, in order; of two that set the same field, the later wins.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import translate
from typing import Any

from fedqsn_cli.errors import InputError, PlanError
from fedqsn_cli.planning.placement import FIELDS, canonical_placement, checked_ratio
from fedqsn_cli.planning.roles import ROLES

_FIELDS = ("match", "role", "masked", "quantized", "p1")


@dataclass(frozen=True, slots=True)
class Override:
    """What the user's rules say about one tensor; None where they are silent."""

    role: str | None = None
    masked: bool | None = None
    quantized: bool | None = None
    p1: float | None = None
    sources: tuple[str, ...] = field(default=())


def parse_overrides(data: bytes, path: object) -> dict[str, Any]:
    """Read the text of a TOML plan file.

    Args:
        path: of the file, for error messages.

    Returns:
        The canonical form: {"rule": [{"match": glob, "role"?: str, "masked"?: bool, "quantized"?: bool, "p1"?: ratio},
        ...], "where"?: str, "layers"?: str, "p1"?: {layers: ratio}}.

    Raises:
        PlanError: it is not TOML, or holds something that a plan file cannot say.
    """
    try:
        document = tomllib.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise PlanError(f"the plan file is not UTF-8 text (byte {error.start})", where=path) from None
    except (ValueError, RecursionError) as error:
        raise PlanError(f"the plan file is not valid TOML ({error})", where=path) from None
    return canonical(document, where=path)


def canonical(document: object, *, where: object = None) -> dict[str, Any]:
    """Check overrides that come from TOML or from a key file, and bring them to canonical form.

    Raises:
        PlanError: an unknown key, a missing match, a wrong type, an unknown role, a rule that sets nothing.
    """
    if not isinstance(document, dict):
        raise PlanError("a plan must be a table", where=where)
    _known(document, ("rule", *FIELDS), "the plan", where, f"write [[rule]] tables, {', '.join(FIELDS)}")
    listed = document.get("rule", [])
    if not isinstance(listed, list):
        raise PlanError("`rule` must be an array of tables", where=where, hint="write [[rule]], not [rule]")
    checked = [_checked(rule, f"rule {position}", where) for position, rule in enumerate(listed, 1)]
    return {"rule": checked, **canonical_placement(document, where)}


def apply_overrides(overrides: dict[str, Any], names: Iterable[str]) -> dict[str, Override]:
    """What the rules say about each tensor that they match.

    Raises:
        PlanError: a rule matches no tensor.
    """
    names = list(names)
    found: dict[str, Override] = {}
    for number, rule in enumerate(overrides["rule"], 1):
        glob = re.compile(translate(rule["match"]))
        matched = [name for name in names if glob.match(name)]
        if not matched:
            hint = "globs match whole tensor names; list them with `fedqsn inspect --show-plan`"
            raise PlanError(f"match = {rule['match']!r} fits no tensor", where=f"rule {number}", hint=hint)
        for name in matched:
            found[name] = _later_wins(found.get(name, Override()), rule, number)
    return found


def _later_wins(before: Override, rule: dict[str, Any], number: int) -> Override:
    return Override(
        role=rule.get("role", before.role),
        masked=rule.get("masked", before.masked),
        quantized=rule.get("quantized", before.quantized),
        p1=rule.get("p1", before.p1),
        sources=(*before.sources, f"rule {number}"),
    )


def _checked(rule: object, label: str, where: object) -> dict[str, Any]:
    place = f"{where}, {label}" if where else label
    if not isinstance(rule, dict):
        raise PlanError("a rule must be a table", where=place)
    _known(rule, _FIELDS, "a rule", place, f"a rule may set {', '.join(_FIELDS)}")
    match = rule.get("match")
    if not isinstance(match, str) or not match:
        raise PlanError('a rule needs match = "<glob>"', where=place)
    role = rule.get("role")
    if role is not None and role not in ROLES:
        raise PlanError(f"unknown role {role!r}", where=place, hint=f"choose one of {', '.join(ROLES)}")
    for name in ("masked", "quantized"):
        if name in rule and not isinstance(rule[name], bool):
            raise PlanError(f"{name} must be true or false, not {rule[name]!r}", where=place)
    if len(rule) == 1:
        raise PlanError("the rule sets nothing", where=place, hint="set role, masked, quantized or p1")
    checked = {name: rule[name] for name in _FIELDS if name in rule}
    return checked if "p1" not in rule else {**checked, "p1": _ratio(rule["p1"], place)}


def _ratio(value: object, place: str) -> float:
    try:
        return checked_ratio(value)
    except InputError as error:
        raise PlanError(error.what, where=place, hint=error.hint) from None


def _known(table: dict[str, Any], allowed: tuple[str, ...], what: str, where: object, hint: str) -> None:
    stray = [key for key in table if key not in allowed]
    if stray:
        raise PlanError(f"{what} cannot hold {stray[0]!r}", where=where, hint=hint)
