"""policy.toml: read strictly, with one line for whatever is wrong in it, and written as a template."""

from __future__ import annotations

import difflib
import hashlib
import os
import tomllib
from collections.abc import Iterable, Sequence
from inspect import isclass
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from fedqsn_cli.auditing.policy import Policy, Scope, Table
from fedqsn_cli.auditing.rules import RULES, SCOPES, required
from fedqsn_cli.checkpoint.files import read_file
from fedqsn_cli.errors import FormatError, InputError

_LARGEST = 4 << 20  # bytes
_UNKNOWN = "is not part of a policy"
_BASE_GIVES_IT = (
    "limits nothing with threat.public_base = true: the base alone comes near it; limit delta_recovered and rho"
)
_OF_NO_BASE = {"cosine": _BASE_GIVES_IT, "log10_nmse": _BASE_GIVES_IT}
_OF_A_BASE = dict.fromkeys(("delta_recovered", "gain"), "needs a public base, but threat.public_base is false")
_NOT_TABLES = frozenset({"model_type", "model_attributes_type", "dict_type"})


def load(path: str | Path) -> Policy:
    """Read a policy.

    Raises:
        InputError: there is no such file. FormatError: it is not TOML, or a key or value in it is not valid.
    """
    if not os.path.lexists(path):
        raise InputError("no such policy file", where=path, hint="write one with 'fedqsn audit --init-policy'")
    data = read_file(Path(path), _LARGEST)
    try:
        document = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not valid TOML ({error})", where=path) from None
    return parse(document, path).with_digest(hashlib.sha256(data).hexdigest())


def parse(document: dict[str, Any], where: object) -> Policy:
    """A policy from a parsed document. Raises FormatError."""
    try:
        policy = Policy.model_validate(document)
    except ValidationError as error:
        raise _explained(error, where) from None
    for name in policy.scope.require:
        if name not in SCOPES and name not in RULES:
            raise _refused("scope.require", f"{name!r} is neither a scope nor a rule", where, name, [*SCOPES, *RULES])
    _check_public_base(policy, where)
    if policy.release.clients is not None and not policy.release.settled:
        raise _refused("release.clients", "needs release.settled = true", where)
    for number, waiver in enumerate(policy.waiver, start=1):
        place, rule = f"waiver {number}.rule", RULES.get(waiver.rule)
        if rule is None:
            raise _refused(place, f"{waiver.rule!r} is not a rule", where, waiver.rule, RULES)
        if rule.severity != "gate":
            why = "a hard invariant" if rule.severity == "hard" else "an audit that is not complete"
            raise _refused(place, f"{rule.id} cannot be waived: it is about {why}", where)
    return policy


def _check_public_base(policy: Policy, where: object) -> None:
    """Refuse limits that mean nothing for a model with, or without, a public base. Raises FormatError."""
    if policy.threat.public_base is None:
        return
    meaningless = _OF_NO_BASE if policy.threat.public_base else _OF_A_BASE
    for name in ("proxy", "coalition", "tensor"):
        for measure in getattr(policy.limits, name).given().keys() & meaningless.keys():
            raise _refused(f"limits.{name}.{measure}", meaningless[measure], where)


def _explained(error: ValidationError, where: object) -> FormatError:
    """The first thing that is wrong: its place in the file, what it is, and what to do."""
    first = error.errors(include_url=False)[0]
    place, kind = first["loc"], first["type"]
    name = _name(place)
    if kind == "extra_forbidden":
        known = list(_fields(place[:-1]))
        near = difflib.get_close_matches(str(place[-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return FormatError(f"{name} {_UNKNOWN}", where=where, hint=hint)
    if kind in _NOT_TABLES:
        return FormatError(f"{name} must be a table, written [{name}]", where=where)
    if place == ("waiver",):
        return FormatError(f"{name} must be a list of tables, each written [[{name}]]", where=where)
    if kind == "missing":
        return FormatError(f"{name} is missing", where=where, hint=f"known here: {', '.join(_fields(place[:-1]))}")
    return FormatError(f"{name} {first['msg']}", where=where)


def _name(place: Sequence[int | str]) -> str:
    """A place in the file: `limits.proxy.cosine`, `waiver 2.rule`."""
    name = ""
    for part in place:
        name += f" {part + 1}" if isinstance(part, int) else f".{part}"
    return name.removeprefix(".")


def _fields(place: Sequence[int | str]) -> Iterable[str]:
    """The keys of the table at a place."""
    table: type[Table] = Policy
    for part in place:
        if isinstance(part, str):
            kind = table.model_fields[part].annotation
            table = kind if isclass(kind) and issubclass(kind, Table) else get_args(kind)[0]
    return table.model_fields


def _refused(place: str, what: str, where: object, given: str = "", choices: Iterable[str] = ()) -> FormatError:
    near = difflib.get_close_matches(given, list(choices), n=1)
    return FormatError(f"{place} {what}", where=where, hint=f"did you mean {near[0]}?" if near else None)


def without_file(*, proxies: bool, ledger: bool) -> Policy:
    """The policy of an audit that was given none: nothing is limited, but what the inputs are for must be checked."""
    require: list[str] = []
    if proxies:  # FQ004 needs several of them or a ledger
        require += [rule for rule in SCOPES["invariants"] if rule != "FQ004"] + ["recovery"]
    if ledger:
        require += ["exposure"]
    return Policy(scope=Scope(require=tuple(require)))


def summary(policy: Policy) -> dict[str, Any]:
    """The policy as plain values, for reports."""
    limits, examples = policy.limits, policy.threat.public_examples
    return {
        "sha256": policy.digest,
        "require": sorted(required(policy)),
        "threat": {**policy.threat.model_dump(), "public_examples": examples and list(examples)},
        "limits": {
            "proxy": limits.proxy.given(),
            "coalition": limits.coalition.given(),
            "tensor": limits.tensor.given(),
            "clear": limits.clear.share,
        },
        "budget": policy.budget.model_dump(),
        "release": policy.release.model_dump(mode="json"),
        "regression": policy.regression.given(),
        "waivers": [{**waiver.model_dump(), "expires": waiver.expires.isoformat()} for waiver in policy.waiver],
    }


def template() -> str:
    """A commented policy to start from."""
    return (Path(__file__).parent / "policy.toml").read_text(encoding="utf-8")
